import pytest
import torch

from callbacks import EMA, EarlyStopOnKL, KLController
from tests.callbacks.tiny import Tiny, trainer


class Averaged(Tiny):
    """Notes in which order it is asked for an average and for its networks."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def enable_ema(self, decay, part, **warmup):
        self.calls.append(("enable_ema", decay, part, warmup))

    def configure_model(self):
        self.calls.append("configure_model")


class TestEMA:
    def test_asks_for_the_average_before_the_networks_are_built(self, tmp_path):
        model = Averaged()
        trainer(tmp_path, callbacks=[EMA(0.9, "actor", warmup="ratio", delay=0)], max_steps=1).fit(model)
        options = {"warmup": "ratio", "power": 0.75, "delay": 0}
        assert model.calls == [("enable_ema", 0.9, "actor", options), "configure_model"]

    def test_leaves_the_choice_of_the_network_to_the_module(self, tmp_path):
        model = Averaged()
        trainer(tmp_path, callbacks=[EMA()]).test(model, verbose=False)
        assert model.calls[0][:3] == ("enable_ema", 0.992, None)

    def test_a_module_without_an_average_is_an_error(self, tmp_path):
        run = trainer(tmp_path, callbacks=[EMA()])
        with pytest.raises(ValueError, match=r"callbacks\.EMA needs a module with enable_ema.*Tiny has none"):
            run.fit(Tiny())

    @pytest.mark.parametrize("decay", [-0.1, 0.0, 1.0, 1.5, float("nan")])
    def test_decay_out_of_range(self, decay):
        with pytest.raises(ValueError, match=r"callbacks\.EMA\.decay must lie between 0 and 1"):
            EMA(decay)

    @pytest.mark.parametrize("options", [{"power": 0.0}, {"delay": -1}, {"warmup": "cosine"}])
    def test_warmup_out_of_range(self, options):
        with pytest.raises(ValueError, match=f"callbacks.EMA.*{next(iter(options))}"):
            EMA(**options)


class TestKLController:
    def test_adapts_once_per_batch(self, tmp_path):
        model = Tiny()
        trainer(tmp_path, callbacks=[KLController(target=6.0, horizon=50.0)], max_steps=5).fit(model)
        assert model.adapted == [(6.0, 50.0)] * 5

    @pytest.mark.parametrize("options", [{"target": 0.0}, {"target": -1.0}, {"target": 1.0, "horizon": 0.0}])
    def test_arguments_out_of_range(self, options):
        with pytest.raises(ValueError, match=r"callbacks\.KLController\.target and horizon must be positive"):
            KLController(**options)

    def test_a_module_without_a_coefficient_is_an_error(self, tmp_path):
        from lightning.pytorch.demos.boring_classes import BoringModel

        with pytest.raises(TypeError, match=r"callbacks\.KLController .* BoringModel has none"):
            trainer(tmp_path, callbacks=[KLController(target=6.0)]).fit(BoringModel())


def stopped_at(folder, callback, kls, ckpt_path=None):
    """Step that a run ends with, for the KL of each rollout; after these it is 0."""
    model = Tiny()
    model.kls = iter(kls)
    run = trainer(folder, callbacks=[callback])
    run.fit(model, ckpt_path=ckpt_path, weights_only=True)
    return run.global_step


class TestEarlyStopOnKL:
    def test_nan_counts_as_above(self, tmp_path):
        assert stopped_at(tmp_path, EarlyStopOnKL(10.0, patience=2), [1.0, float("nan"), float("nan"), 1.0]) == 3

    def test_stops_at_once_by_default(self, tmp_path):
        assert stopped_at(tmp_path, EarlyStopOnKL(10.0), [1.0, 9.9, 10.1, 1.0]) == 3

    def test_the_limit_itself_is_allowed(self, tmp_path):
        assert stopped_at(tmp_path, EarlyStopOnKL(10.0), [10.0] * 12) == 12

    def test_patience_counts_consecutive_rollouts(self, tmp_path):
        assert stopped_at(tmp_path, EarlyStopOnKL(10.0, patience=3), [11, 11, 1, 11, 11, 11, 1]) == 6

    def test_the_count_survives_a_resume(self, tmp_path):
        model, path = Tiny(), tmp_path / "two.ckpt"
        model.kls = iter([1.0, 11.0])
        run = trainer(tmp_path, callbacks=[EarlyStopOnKL(10.0, patience=3)], max_steps=2)
        run.fit(model)
        run.save_checkpoint(path)
        assert torch.load(path, weights_only=True)["callbacks"]["EarlyStopOnKL"] == {"above": 1}
        assert stopped_at(tmp_path, EarlyStopOnKL(10.0, patience=3), [11.0, 11.0], ckpt_path=path) == 4

    @pytest.mark.parametrize(("max_kl", "patience"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
    def test_arguments_out_of_range(self, max_kl, patience):
        with pytest.raises(ValueError, match=r"callbacks\.EarlyStopOnKL: max_kl must be positive and patience >= 1"):
            EarlyStopOnKL(max_kl, patience)
