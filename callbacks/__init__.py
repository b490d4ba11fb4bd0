"""Callbacks and Trainer plugins; they know modules by a few documented methods only."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AppendingCSVLogger": "csv_logger",
        "AtomicCheckpointIO": "checkpoint_io",
        "AudioSamples": "audio",
        "AudioWriter": "audio",
        "DiversityTable": "diversity",
        "EMA": "ema",
        "EarlyStopOnKL": "kl",
        "ExportPretrained": "export",
        "HangWatch": "hang",
        "KLController": "kl",
        "LearningCurves": "curves",
        "PredictionWriter": "samples",
        "RNGState": "rng",
        "Requeue": "requeue",
        "SampleTable": "samples",
        "StripImages": "strips",
        "Throughput": "throughput",
        "TrainingDynamicsRecorder": "dynamics",
    },
)
