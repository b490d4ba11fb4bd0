"""Diffusion of waveforms: the process, its samplers, the network, training, the pipeline, and metrics of sound."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Evaluation": "evaluation",
        "Guidance": "samplers",
        "LitWaveform": "module",
        "PretrainedText": "text",
        "PretrainedWaveform": "recipes",
        "SampleMetrics": "evaluation",
        "Sampling": "options",
        "SmallText": "text",
        "SoundTagger": "metrics.tagger",
        "TextCache": "text",
        "TextRecipe": "text",
        "TextStates": "text",
        "TextToWaveformPipeline": "pipeline",
        "TimeSampler": "functional",
        "Times": "options",
        "UnconditionalUNet1D": "recipes",
        "VDDIMScheduler": "samplers",
        "VDPMSolverScheduler": "samplers",
        "WaveformLoss": "options",
        "WaveformUNet": "recipes",
        "WaveformUNet1DModel": "modeling",
        "load_pipeline": "sounds",
        "load_text_encoder": "text",
        "word_tokenizer": "text",
        "write_sound": "sounds",
    },
)
