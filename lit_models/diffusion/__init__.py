"""Diffusion of waveforms: the process, its samplers, the network, and metrics of sound."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Guidance": "samplers",
        "TimeSampler": "functional",
        "VDDIMScheduler": "samplers",
        "VDPMSolverScheduler": "samplers",
        "WaveformUNet1DModel": "modeling",
    },
)
