"""Recipes for Hugging Face causal language models: where the weights come from and how they are adapted.

A recipe is plain data, so it can be written in YAML, saved in a checkpoint and built again anywhere.
"""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)
from lit_models.gguf import find_gguf
from lit_models.nn.activations import fuse_gelu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_models.nn.scoring import TokenScorer


@dataclass
class LoRA:
    """Low-rank adapters on the linear layers of a network (needs the `lora` extra).

    Args:
        r: rank.
        alpha: scale of the update, divided by `r`.
        dropout: dropout on the adapters' input.
        targets: names of the adapted layers, or "all-linear".
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] | str = "all-linear"

    def apply(self, model: "PreTrainedModel") -> None:
        """Freeze the model and add trainable adapters in place; a `score` head stays trainable."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("lora: needs the peft package; pip install 'lit-models[lora]'") from error
        head = getattr(model, "score", None)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, list) else _linear_layers(model),
        )
        inject_adapter_in_model(config, model)
        if head is not None:
            head.requires_grad_(True)


def _linear_layers(model: "PreTrainedModel") -> list[str]:
    """Names of the linear layers of the trunk; Conv1D is GPT-2's transposed linear layer."""
    trunk = model.base_model
    kinds = ("Linear", "Conv1D")
    return sorted({name.rpartition(".")[2] for name, module in trunk.named_modules() if type(module).__name__ in kinds})


def adapter_layers(network: nn.Module) -> dict[str, Any]:
    """Layers that carry adapters, by name."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def has_adapters(network: nn.Module) -> bool:
    """Whether LoRA adapters were added to a network."""
    return bool(adapter_layers(network))


@contextmanager
def adapters_off(model: "PreTrainedModel") -> Iterator[None]:
    """Run a network without its adapters, which gives the network they were added to."""
    layers = adapter_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: "PreTrainedModel") -> "PreTrainedModel":
    """Copy of a network with its adapters folded into the weights; the network itself if it has none."""
    if not has_adapters(model):
        return model
    model = copy.deepcopy(model)
    for name, layer in adapter_layers(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


def fold_adapters(model: "PreTrainedModel", state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of the network that `merged` would give, for networks that can't be copied, such as sharded ones.

    Args:
        model: network with adapters; only their places and scales are read.
        state: its whole state.

    Returns:
        State without adapters.
    """
    folded = dict(state)
    for name, layer in adapter_layers(model).items():
        own = {key: folded.pop(key) for key in list(folded) if key.startswith(f"{name}.")}
        base = {
            key.replace(".base_layer.", ".", 1): value
            for key, value in own.items()
            if key.startswith(f"{name}.base_layer.")
        }
        for adapter in layer.active_adapters:
            pair = [own.get(f"{name}.lora_{part}.{adapter}.weight") for part in "AB"]
            transposed = getattr(layer, "fan_in_fan_out", False)
            if pair[0] is None:  # that of a table of embeddings
                pair, transposed = [own[f"{name}.lora_embedding_{part}.{adapter}"] for part in "AB"], True
            down, up = pair
            assert down is not None
            assert up is not None
            delta = (up.float() @ down.float()) * layer.scaling[adapter]
            weight = base[f"{name}.weight"]
            base[f"{name}.weight"] = weight + (delta.T if transposed else delta).to(weight.dtype)
        folded |= base
    return folded


class Backbone(ABC):
    """Recipe for a causal language model or, with a scalar head on its trunk, for a token scorer."""

    lora: LoRA | None = None
    reproducible = True
    """Whether building again gives the same weights; otherwise frozen copies belong in the checkpoint."""

    @abstractmethod
    def load(self) -> "PreTrainedModel":
        """Make the causal language model."""

    def load_scorer(self) -> "PreTrainedModel":
        """Make the sequence-classification model with one label; a fresh head where the source has none."""
        from lit_models.nn.scoring import scorer_from_lm

        return scorer_from_lm(self.load())

    def build(self) -> "PreTrainedModel":
        """Make the causal language model, in training mode, with adapters if asked for."""
        return self._finish(self.load())

    def build_scorer(self) -> "TokenScorer":
        """Make the per-token scorer, in training mode, with adapters if asked for."""
        from lit_models.nn.scoring import TokenScorer

        return TokenScorer(self._finish(self.load_scorer()))

    def _finish(self, model: "PreTrainedModel") -> "PreTrainedModel":
        fuse_gelu(model)
        model.requires_grad_(True)  # averages and merged adapters of a checkpoint come frozen
        if self.lora is not None:
            self.lora.apply(model)
        return model.train()


@dataclass
class FromPretrained(Backbone):
    """A model by hub id or local folder.

    Args:
        name: hub id or folder written by `save_pretrained`.
        dtype: type of the weights, whatever type they were saved in.
        revision: branch, tag or commit on the hub.
        attn: attention implementation, for example "sdpa" or "flash_attention_2".
        trust_remote_code: run model code that comes with the weights.
        lora: adapters to train instead of the weights.
    """

    name: str
    dtype: str = "float32"
    revision: str | None = None
    attn: str | None = None
    trust_remote_code: bool = False
    lora: LoRA | None = None

    def load(self) -> "PreTrainedModel":
        """Load the causal language model."""
        return self._load("AutoModelForCausalLM")[0]

    def load_scorer(self) -> "PreTrainedModel":
        """Load the scorer, head included where the folder has one."""
        from lit_models.nn.scoring import init_score_head

        model, info = self._load("AutoModelForSequenceClassification", num_labels=1)
        if any(key.startswith("score.") for key in info["missing_keys"]):
            init_score_head(model)
        return model

    def _load(self, auto_class: str, **kwargs: Any) -> tuple["PreTrainedModel", dict[str, Any]]:  # noqa: ANN401
        import transformers

        if self.attn is not None:
            kwargs["attn_implementation"] = self.attn
        try:
            loaded: tuple[PreTrainedModel, dict[str, Any]] = getattr(transformers, auto_class).from_pretrained(
                self.name,
                dtype=_dtype(self.dtype),
                revision=self.revision or "main",
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **kwargs,
            )
        except OSError as error:
            raise ValueError(
                f"name: {self.name!r} is neither a model on the hub nor a local folder with one; an earlier stage "
                "writes such a folder with callbacks.ExportPretrained"
            ) from error
        return loaded


@dataclass
class FromConfig(Backbone):
    """A model trained from scratch.

    Args:
        config: family name such as "llama" or "gpt2", or path of a Hugging Face `config.json`.
        overrides: fields of the configuration that replace the defaults.
        dtype: type of the weights.
        attn: attention implementation.
        lora: adapters to train instead of the weights.
    """

    config: str
    overrides: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attn: str | None = None
    lora: LoRA | None = None
    reproducible = False

    def load(self) -> "PreTrainedModel":
        """Initialise the causal language model."""
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_config(self._config(), **self._options())
        return model

    def load_scorer(self) -> "PreTrainedModel":
        """Initialise the scorer."""
        from transformers import AutoModelForSequenceClassification

        from lit_models.nn.scoring import init_score_head

        config = self._config()
        config.num_labels = 1
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, **self._options())
        init_score_head(model)
        return model

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"dtype": _dtype(self.dtype)}
        return options if self.attn is None else options | {"attn_implementation": self.attn}

    def _config(self) -> Any:  # noqa: ANN401
        from transformers import AutoConfig

        values: dict[str, Any] = {}
        family = self.config
        if family.endswith(".json"):
            path = Path(family)
            if not path.is_file():
                raise ValueError(
                    f"config: there is no file {family!r}; give a config.json or a family name such as llama"
                )
            values = json.loads(path.read_text())
            family = values.pop("model_type")
        try:
            return AutoConfig.for_model(family, **(values | self.overrides))
        except ValueError as error:
            raise ValueError(
                f"config: {family!r} is not a model family of transformers, such as llama or gpt2"
            ) from error


@dataclass
class FromGGUF(Backbone):
    """A model from a GGUF file, with its weights turned back into full precision (needs the `gguf` extra).

    Args:
        file: path of the file; with `package`, a name inside that installed package, or null for its only GGUF file.
        package: installed Python package that ships the file.
        dtype: type of the weights.
        lora: adapters to train instead of the weights.
    """

    file: str | None = None
    package: str | None = None
    dtype: str = "float32"
    lora: LoRA | None = None

    def path(self) -> Path:
        """Where the file lies.

        Raises:
            ValueError: if there is no such file or package.
        """
        return find_gguf(self.file, self.package)

    def load(self) -> "PreTrainedModel":
        """Load the causal language model."""
        from transformers import AutoModelForCausalLM, GgufConfig

        path = self.path()
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=_dtype(self.dtype),
            quantization_config=GgufConfig(dequantize=True),
        )
        return model


@dataclass
class FromCheckpoint(Backbone):
    """A network out of a Lightning checkpoint of this collection.

    Args:
        path: checkpoint file.
        part: name of the network in it: `net` for one-network methods, `actor`, `critic` or `ema` for PPO.
        lora: adapters to train instead of the weights.
    """

    path: str
    part: str = "net"
    lora: LoRA | None = None

    def load(self) -> "PreTrainedModel":
        """Take the causal language model out of the checkpoint."""
        network = self._part()
        if hasattr(network, "model") and hasattr(network.model, "score"):
            raise ValueError(f"part: {self.part!r} of {self.path!r} is a scorer, not a language model")
        return merged(network)

    def load_scorer(self) -> "PreTrainedModel":
        """Take the scorer out of the checkpoint, or put a fresh head on the language model there."""
        from lit_models.nn.scoring import TokenScorer, scorer_from_lm

        network = self._part()
        return merged(network.model) if isinstance(network, TokenScorer) else scorer_from_lm(merged(network))

    def _part(self) -> Any:  # noqa: ANN401
        from lit_models.base import LitBase

        module = LitBase.load_from_checkpoint(self.path, map_location="cpu")
        network = getattr(module, self.part, None)
        if not isinstance(network, nn.Module):
            parts = [name for name, _ in module.named_children()]
            raise ValueError(f"part: {self.path!r} has no {self.part!r}; it holds {', '.join(parts)}")
        return network


@dataclass
class FromModule(Backbone):
    """A model that exists in memory, for use from Python; each build is a copy.

    Args:
        module: causal language model, or sequence-classification model with one label.
        lora: adapters to train instead of the weights.
    """

    module: "PreTrainedModel"
    lora: LoRA | None = None
    reproducible = False

    def load(self) -> "PreTrainedModel":
        """Copy the causal language model."""
        return copy.deepcopy(self.module)

    def load_scorer(self) -> "PreTrainedModel":
        """Copy the scorer, or put a fresh head on a copy of the language model."""
        return self.load() if hasattr(self.module, "score") else super().load_scorer()

    def plain(self) -> dict[str, Any]:
        """Recipe of the architecture; the weights are in the checkpoint."""
        config = self.module.config.to_diff_dict()
        family = config.pop("model_type")
        recipe = FromConfig(family, config, str(self.module.dtype).removeprefix("torch."), lora=self.lora)
        return {"class_path": f"{__name__}.FromConfig", "init_args": asdict(recipe)}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {name!r} is not a torch type such as float32 or bfloat16")
    return dtype
