"""How the kinds of simulators make factors of pairs of a pool and a test example.

Shapes: N pool examples, M tests, Q metrics, D features, P numbers that are multiplied, H hidden units, n the order.
Sources: Simfluence (arXiv 2303.08114), GPTfluence (arXiv 2404.07840) and its released code.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_models.influence.configuration import SimulatorConfig


def mlp(features: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers with a ReLU between them, as the released towers are."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))


class Form(ABC):
    """How a kind makes factors; its weights lie in the simulator itself, under the released names.

    `train` and `test` are features (..., D), or numbers of rows for kinds without features. The axis of n+1 roles holds
    the factors of the history from the oldest value to the newest, and last those that are added.

    Args:
        config: configuration of the simulator.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self.roles = config.order + 1
        self.metrics = len(config.metrics)

    @abstractmethod
    def build(self, config: SimulatorConfig) -> dict[str, nn.Module]:
        """Networks by name."""

    @abstractmethod
    def table(self, net: Any, train: Tensor, test: Tensor) -> Tensor:  # noqa: ANN401
        """Factors of all pairs: (N, ·) and (M, ·) -> (n+1, N, Q, M)."""

    @abstractmethod
    def pairs(self, net: Any, train: Tensor, test: Tensor, left: Tensor, right: Tensor) -> Tensor:  # noqa: ANN401
        """Factors of single pairs: (N, ·), (M, ·) and their rows `left` and `right`, both (...,) -> (n+1, ..., Q)."""

    def elements(self, config: SimulatorConfig) -> int:
        """Numbers that `table` holds for a pair while it works."""
        return self.roles * self.metrics


class FreeForm(Form):
    """Numbers of every pair, as in Simfluence."""

    def __init__(self, config: SimulatorConfig) -> None:
        super().__init__(config)
        self.size = config.num_train or 0

    def build(self, config: SimulatorConfig) -> dict[str, nn.Module]:
        """A table whose row N·test + id holds the factors of all metrics."""
        return {"emb": nn.Embedding(self.size * (config.num_test or 0), self.roles * self.metrics)}

    def factors(self, net: Any, entries: Tensor) -> Tensor:  # noqa: ANN401
        """Factors from entries of the table: (..., E) -> (n+1, ..., Q)."""
        return entries.unflatten(-1, (self.metrics, self.roles)).movedim(-1, 0)

    def table(self, net: Any, train: Tensor, test: Tensor) -> Tensor:  # noqa: ANN401
        """See `Form.table`."""
        entries = net.emb.weight.unflatten(0, (-1, self.size))
        for dim, rows in enumerate((test, train)):
            if not torch.equal(rows, torch.arange(entries.shape[dim], device=rows.device)):
                entries = entries.index_select(dim, rows)
        return self.factors(net, entries).permute(0, 2, 3, 1)

    def pairs(self, net: Any, train: Tensor, test: Tensor, left: Tensor, right: Tensor) -> Tensor:  # noqa: ANN401
        """See `Form.pairs`."""
        return self.factors(net, net.emb(self.size * test[right] + train[left]))


class VectorForm(FreeForm):
    """A vector of every pair, and a small network that reads it."""

    def build(self, config: SimulatorConfig) -> dict[str, nn.Module]:
        """The table, a hidden layer and a head per role."""
        pairs = self.size * (config.num_test or 0)
        heads = {f"fc{role + 2}": nn.Linear(config.hidden_width, self.metrics) for role in range(self.roles)}
        return {
            "emb": nn.Embedding(pairs, config.embedding_dim),
            "fc1": nn.Linear(config.embedding_dim, config.hidden_width),
            **heads,
        }

    def factors(self, net: Any, entries: Tensor) -> Tensor:  # noqa: ANN401
        """See `FreeForm.factors`."""
        return _heads([getattr(net, f"fc{role + 2}") for role in range(self.roles)], F.relu(net.fc1(entries)))

    def elements(self, config: SimulatorConfig) -> int:
        """See `Form.elements`."""
        return 2 * config.hidden_width


class TowerForm(Form):
    """Inner products of what networks make of the features of either side."""

    def __init__(self, config: SimulatorConfig) -> None:
        super().__init__(config)
        features = config.feature_dim or 0
        self.inner = features if config.kind == "feat_shared" else config.width
        self.scale = 1 / self.inner if config.tower_scale == "1/P" else float(config.tower_scale)
        self.names = [self._names("train", config)]
        self.names.append(self.names[0] if config.is_shared else self._names("test", config))

    def _names(self, side: str, config: SimulatorConfig) -> list[str]:
        if config.kind == "feat_shared":
            return [f"mlp_layers.{role}" for role in range(self.roles)] if config.norder else ["mlp_a", "mlp_b"]
        layers = "maps" if config.kind == "feat_linear" else "mlps"
        return [f"{side}_{layers}.{role}" for role in range(self.roles)]

    def build(self, config: SimulatorConfig) -> dict[str, nn.Module]:
        """A network per role, and per side unless they share it."""
        features, out = config.feature_dim or 0, self.inner * self.metrics

        def network() -> nn.Module:
            if config.kind == "feat_linear":
                return nn.Linear(features, out, bias=False)
            return mlp(features, features if config.kind == "feat_shared" else config.width, out)

        networks: dict[str, nn.Module] = {}
        for name in dict.fromkeys(self.names[0] + self.names[1]):
            parent, _, role = name.partition(".")
            if role:
                cast(nn.ModuleList, networks.setdefault(parent, nn.ModuleList())).append(network())
            else:
                networks[name] = network()
        return networks

    def vectors(self, net: Any, features: Tensor, side: int) -> Tensor:  # noqa: ANN401
        """(..., D) -> (n+1, ..., Q, P); side 0 is the pool, 1 the tests."""
        out = torch.stack([net.get_submodule(name)(features) for name in self.names[side]])
        return out.float().unflatten(-1, (self.metrics, self.inner))

    def table(self, net: Any, train: Tensor, test: Tensor) -> Tensor:  # noqa: ANN401
        """See `Form.table`."""
        left, right = self.scale * self.vectors(net, train, 0), self.vectors(net, test, 1)
        return (left.transpose(1, 2) @ right.permute(0, 2, 3, 1)).transpose(1, 2)

    def pairs(self, net: Any, train: Tensor, test: Tensor, left: Tensor, right: Tensor) -> Tensor:  # noqa: ANN401
        """See `Form.pairs`; each example goes through its network once."""
        pool, targets = self.scale * self.vectors(net, train, 0), self.vectors(net, test, 1)
        return (pool[:, left] * targets[:, right]).sum(-1)


class ConcatForm(Form):
    """A network on the features of both sides together."""

    def __init__(self, config: SimulatorConfig) -> None:
        super().__init__(config)
        self.deep = config.norder
        self.first = "mlp.0" if self.deep else "fc"
        self.heads = [f"fc_layers.{role}" for role in range(self.roles)] if self.deep else ["fca", "fcb"]

    def build(self, config: SimulatorConfig) -> dict[str, nn.Module]:
        """The trunk and a head per role."""
        both, hidden = 2 * (config.feature_dim or 0), config.hidden_width
        heads = [nn.Linear(hidden, self.metrics) for _ in range(self.roles)]
        if not self.deep:
            return {"fc": nn.Linear(both, hidden), **dict(zip(self.heads, heads, strict=True))}
        trunk = nn.Sequential(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, hidden), nn.ReLU())
        return {"mlp": trunk, "fc_layers": nn.ModuleList(heads)}

    def _parts(self, net: Any, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """What either side adds to the first layer, which is linear in both: (N, H) and (M, H)."""
        layer: nn.Linear = net.get_submodule(self.first)
        left, right = layer.weight.tensor_split(2, 1)
        return F.linear(train, left), F.linear(test, right, layer.bias)

    def _factors(self, net: Any, first: Tensor) -> Tensor:  # noqa: ANN401
        hidden = F.relu(first)
        if self.deep:
            hidden = F.relu(net.mlp[2](hidden))
        return _heads([net.get_submodule(name) for name in self.heads], hidden)

    def table(self, net: Any, train: Tensor, test: Tensor) -> Tensor:  # noqa: ANN401
        """See `Form.table`."""
        left, right = self._parts(net, train, test)
        return self._factors(net, left[:, None] + right).transpose(2, 3)

    def pairs(self, net: Any, train: Tensor, test: Tensor, left: Tensor, right: Tensor) -> Tensor:  # noqa: ANN401
        """See `Form.pairs`."""
        pool, targets = self._parts(net, train, test)
        return self._factors(net, pool[left] + targets[right])

    def elements(self, config: SimulatorConfig) -> int:
        """See `Form.elements`."""
        return 4 * (config.feature_dim or 0) + 2 * config.hidden_width if self.deep else 2 * config.hidden_width


def _heads(layers: Sequence[nn.Linear], hidden: Tensor) -> Tensor:
    """All heads at once: (..., H) -> (n+1, ..., Q) float32."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return F.linear(hidden, weight, bias).float().unflatten(-1, (len(layers), -1)).movedim(-2, 0)


FORMS: dict[str, type[Form]] = {
    "linear": FreeForm,
    "vector": VectorForm,
    "feat_shared": TowerForm,
    "feat_linear": TowerForm,
    "feat_mlp": TowerForm,
    "feat_concat": ConcatForm,
}
