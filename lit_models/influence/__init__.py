"""Simulators of training runs: what would the model's losses be, had it been trained on other examples?"""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CausalLMFeatures": "features",
        "Factors": "functional",
        "Featurizer": "features",
        "GradFeatures": "features",
        "GradientOptions": "gradients",
        "HFEncoder": "features",
        "HiddenFeatures": "features",
        "InfluenceSimulator": "modeling",
        "LinearDatamodelingScore": "metrics",
        "LitInfluence": "module",
        "MislabelDetection": "metrics",
        "PerSampleGradients": "gradients",
        "SimulatorConfig": "configuration",
        "SimulatorOptions": "configuration",
        "TensorFeatures": "features",
        "TrajectoryErrors": "metrics",
        "checkpoint_of_step": "tracin",
        "estimate": "tracin",
        "grad_cos": "tracin",
        "grad_dot": "tracin",
        "predict_trajectory": "tracin",
        "tracin_cp": "tracin",
        "tracin_self": "tracin",
        "trajectory_influence": "tracin",
        "trajectory_scale": "tracin",
    },
)
