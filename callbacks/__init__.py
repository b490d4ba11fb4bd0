"""Callbacks and Trainer plugins; they know modules by a few documented methods only."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AppendingCSVLogger": "csv_logger",
        "AtomicCheckpointIO": "checkpoint_io",
        "DiversityTable": "diversity",
        "EMA": "ema",
        "EarlyStopOnKL": "kl",
        "ExportPretrained": "export",
        "KLController": "kl",
        "LearningCurves": "curves",
        "PredictionWriter": "samples",
        "RNGState": "rng",
        "SampleTable": "samples",
        "StripImages": "strips",
        "Throughput": "throughput",
        "TrainingDynamicsRecorder": "dynamics",
    },
)
