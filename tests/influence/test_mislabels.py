"""Scores that point at wrong labels, and what is found by following them."""

import pytest
import torch
from torch import nn

from lit_models.influence.configuration import SimulatorConfig
from lit_models.influence.counterfactual import mean_effects
from lit_models.influence.gradients import PerSampleGradients
from lit_models.influence.metrics import auc
from lit_models.influence.mislabels import inspect, mean_effect, self_alpha, suspicion
from lit_models.influence.modeling import InfluenceSimulator

N, M, D = 10, 4, 6


def simulator(**options):
    torch.manual_seed(0)
    net = InfluenceSimulator(
        SimulatorConfig(num_train=N, num_test=M, feature_dim=D, lr_scaling=False, **({"kind": "feat_shared"} | options))
    )
    if net.config.has_features:
        net.set_examples(train_features=torch.randn(N, D), test_features=torch.randn(M, D))
    return net


def test_self_alpha_is_the_squared_length_behind_the_shared_network():
    net = simulator()
    vectors = net.mlp_a(net.train_features)
    assert torch.allclose(self_alpha(net), vectors.square().sum(1) / D, atol=1e-6)
    assert torch.equal(suspicion("self_alpha", net), self_alpha(net))
    features = torch.randn(3, D)
    assert self_alpha(net, features).shape == (3,)
    assert self_alpha(simulator(kind="feat_mlp", separate_towers=False)).shape == (N,)
    assert not self_alpha(net).requires_grad


@pytest.mark.parametrize("kind", ["feat_mlp", "feat_linear", "feat_concat", "linear"])
def test_self_alpha_needs_shared_networks(kind):
    with pytest.raises(
        ValueError, match=f"those of {kind} were never trained .*; set model.simulator.kind to feat_shar"
    ):
        self_alpha(simulator(kind=kind))


def test_mean_effect_points_at_what_harms():
    net, reference = simulator(kind="feat_mlp"), torch.rand(5, M)
    scores = mean_effect(net, reference, tests=[1, 3, 0, 2])
    assert torch.allclose(scores, mean_effects(net, reference, [1, 3, 0, 2]).mean(1))
    assert torch.equal(mean_effect(net, reference, [1, 3, 0, 2], goal="max"), -scores)
    assert torch.equal(suspicion("mean_effect", net, reference, [1, 3, 0, 2]), scores)


def test_gradients_and_losses_are_scores_too():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = (torch.randn(N, 3), torch.randn(N, 1))
    source = PerSampleGradients(model, lambda net, example: (net(example[0]) - example[1]).square().sum())
    weights = [{name: value * factor for name, value in model.state_dict().items()} for factor in (1.0, 0.5)]
    scores = suspicion("tracin_self", source=source, checkpoints=weights, lrs=[0.1, 0.2], examples=data)
    expected = torch.zeros(N)
    for state, lr in zip(weights, (0.1, 0.2), strict=True):
        error = 2 * (data[0] @ state["weight"].T + state["bias"] - data[1]).squeeze(1)
        expected += lr * error.square() * (data[0].square().sum(1) + 1)
    assert torch.allclose(scores, expected, rtol=1e-4)
    assert suspicion("train_loss", losses=torch.tensor([1.0, 3.0])).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("train_loss", "losses: score train_loss needs losses; give losses"),
        ("mean_effect", "reference: score mean_effect needs simulator, reference; give reference"),
        ("tracin_self", "source: score tracin_self needs source, checkpoints, lrs, examples; give source"),
        ("loss", "score: 'loss' is not one of self_alpha, mean_effect, tracin_self, train_loss"),
    ],
)
def test_what_a_score_needs_is_asked_for(score, message):
    with pytest.raises(ValueError, match=message):
        suspicion(score, simulator())


def test_inspection_counts_what_is_found():
    scores = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.2])
    flipped = torch.tensor([1, 0, 0, 1, 0])
    found = inspect(scores, flipped, (0.4, 0.6))
    assert found.order.tolist() == [0, 2, 3, 4, 1]
    assert found.inspected.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert found.found.tolist() == [0, 0.5, 0.5, 1, 1, 1]
    assert found.values["auc"] == pytest.approx(float(auc(scores, flipped.bool())))
    assert found.values["found_40"] == 0.5
    assert found.values["found_60"] == 1
    for bad, labels, message in (
        (scores, flipped[:4], "is_flipped has shape"),
        (scores * torch.nan, flipped, "scores: that of example 0 is not a number"),
        (scores, torch.zeros(5), "all labels are alike"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect(bad, labels)
