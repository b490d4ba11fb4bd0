"""Text encoders: where they come from, what they say about a text, and a cache for those that are not trained.

Shapes: B texts, n tokens of the longest, E width of the encoder.
An encoder may be any of Hugging Face's: with a class token (BERT, XLM-R), without one (T5 and its relatives), the
encoder half of a translation or summary model (BART), or the text tower of a model of text and sound (CLAP).
Source: ERNIE-Music (arXiv 2302.04456), where the vector of a text is fused with the time, and attention reads its
states.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import hashlib
import importlib
import inspect
import os
import tempfile
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lit_models._ranks import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Pooling = Literal["auto", "first", "mean"]

BYTES = "byt5"
"""Name of the tokenizer that turns texts into bytes and needs no files."""
UNKNOWN, PADDING = "[UNK]", "[PAD]"


class TextStates(NamedTuple):
    """What an encoder says about texts.

    Args:
        vector: (B, E) float32, one vector per text.
        states: (B, n, E) float32, one vector per token; zero where the mask is false.
        mask: (B, n) bool, true for tokens of the text, false for padding.
    """

    vector: Tensor
    states: Tensor
    mask: Tensor

    def to(self, device: torch.device | str | None) -> "TextStates":
        """The same on another device."""
        return TextStates(*(part.to(device) for part in self))

    def repeat_interleave(self, repeats: int) -> "TextStates":
        """Each text several times in a row."""
        return TextStates(*(part.repeat_interleave(repeats, 0) for part in self))


def stack_texts(texts: Sequence[TextStates]) -> TextStates:
    """Put texts of any lengths into one batch, padded on the right.

    Args:
        texts: batches of equal E.

    Returns:
        All their rows in order.
    """
    longest = max(text.mask.shape[1] for text in texts)

    def padded(part: Tensor) -> Tensor:
        missing = longest - part.shape[1]
        return torch.cat([part, part.new_zeros(len(part), missing, *part.shape[2:])], 1) if missing else part

    return TextStates(
        torch.cat([text.vector for text in texts]),
        torch.cat([padded(text.states) for text in texts]),
        torch.cat([padded(text.mask) for text in texts]),
    )


# -- from texts to states ----------------------------------------------------------------------------------------------


def resolve_pooling(pooling: Pooling, tokenizer: "PreTrainedTokenizerBase") -> Pooling:
    """The pooling that "auto" stands for with a tokenizer.

    Args:
        pooling: "first", "mean", or "auto": "first" if the tokenizer puts a class token first, else "mean".
        tokenizer: of the encoder.

    Returns:
        "first" or "mean".

    Raises:
        ValueError: if the pooling is unknown.
    """
    check_text_options(pooling)
    if pooling != "auto":
        return pooling
    if tokenizer.cls_token is None:
        return "mean"
    return "first" if _ids(tokenizer, ["a"])[0][:1] == [tokenizer.cls_token_id] else "mean"


def check_text_options(pooling: str, max_tokens: int = 1) -> None:
    """Raise ValueError if the pooling is unknown or `max_tokens` below 1, naming it."""
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling: {pooling!r} is unknown; choose one of {', '.join(get_args(Pooling))}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} leaves nothing of a text; use 1 or more")


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector per text.

    Args:
        states: (B, n, E) of the tokens, in any floating dtype.
        mask: (B, n) bool or integer, true for tokens of the text; padding may be on either side.
        pooling: "first" takes the first token of the text, which should be the class token; "mean" the mean of all.

    Returns:
        (B, E) float32; zero for a text without tokens.

    Raises:
        ValueError: if the pooling is neither of them.
    """
    mask = mask.bool()
    states = states.float().masked_fill(~mask[..., None], 0.0)
    if pooling == "first":
        place = mask.byte().argmax(1)
        return states[torch.arange(len(states), device=states.device), place]
    if pooling == "mean":
        return states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    raise ValueError(f"pooling: {pooling!r} is neither first nor mean; ask resolve_pooling what auto stands for")


class _CutTexts:
    """Number of texts that were cut in this process."""

    number = 0


def cut_texts() -> int:
    """Number of texts that `tokenize` cut in this process so far."""
    return _CutTexts.number


def _count_cut(number: int, total: int, limit: int) -> None:
    if _CutTexts.number == 0:
        are, were = ("is", "was") if number == 1 else ("are", "were")
        warn(
            f"max_tokens: {number} of {total} texts {are} longer than {limit} tokens and {were} cut; raise it, up to "
            "what the encoder can read. More are counted without a warning, see lit_models.diffusion.text.cut_texts",
            stacklevel=3,
        )
    _CutTexts.number += number


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
    options: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
    rows = tokenizer(list(texts), padding=False, verbose=False, return_attention_mask=False, **options)
    return [list(row) for row in rows["input_ids"]]


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    """Tokens of texts, padded on the right whatever the tokenizer's own side, which keeps all positions exact.

    Longer texts are cut, keeping the tokens that the tokenizer itself puts around a text. The first cut of a process
    warns; `cut_texts` counts them all. A text without any token, such as "" for some tokenizers, becomes one token of
    padding that counts as the text.

    Args:
        tokenizer: any of Hugging Face's.
        texts: B texts.
        max_tokens: most tokens of a text.

    Returns:
        `input_ids` (B, n) int64 and `attention_mask` (B, n) int64 with 1 for the text.

    Raises:
        ValueError: if there is no text, `max_tokens` is below 1, or something is not a text.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} leaves nothing of a text; use 1 or more")
    if isinstance(texts, str) or not texts:
        raise ValueError("texts: give a list with at least one text")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts: {text!r} is not a text; give strings")
    limit = min(max_tokens, tokenizer.model_max_length or max_tokens)
    rows = _ids(tokenizer, texts)
    if number := sum(len(row) > limit for row in rows):
        _count_cut(number, len(rows), limit)
        # Tokens around a text may alone be more than the limit, which tokenizers do not cut.
        rows = [row[:limit] for row in _ids(tokenizer, texts, limit)]
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(candidate for candidate in candidates if candidate is not None)
    rows = [row or [padding] for row in rows]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [padding] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def encode(encoder: nn.Module, tokens: dict[str, Tensor], pooling: Pooling) -> TextStates:
    """States of texts; gradients flow if they are enabled.

    Args:
        encoder: its forward takes `input_ids` and `attention_mask` and returns `last_hidden_state`.
        tokens: see `tokenize`; they are moved to the encoder.
        pooling: "first" or "mean", see `resolve_pooling`.

    Returns:
        The states, float32 whatever the dtype of the encoder and under autocast.
    """
    device = next(encoder.parameters()).device
    ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    mask = mask.bool()
    return TextStates(pool(states, mask, pooling), states.masked_fill(~mask[..., None], 0.0), mask)


def encode_texts(
    encoder: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    pooling: Pooling = "auto",
    max_tokens: int = 128,
) -> TextStates:
    """States of texts: `tokenize`, `resolve_pooling` and `encode` in one call.

    Args:
        encoder: see `encode`.
        tokenizer: of the encoder.
        texts: B texts.
        pooling: see `resolve_pooling`.
        max_tokens: most tokens of a text.

    Returns:
        The states on the encoder's device.
    """
    return encode(encoder, tokenize(tokenizer, texts, max_tokens), resolve_pooling(pooling, tokenizer))


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Put a network and all its parts into evaluation mode for a while."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# -- encoders ----------------------------------------------------------------------------------------------------------


def load_text_encoder(
    name: str, dtype: str = "float32", revision: str | None = None, trust_remote_code: bool = False
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the part of a model that reads text.

    That is the encoder half of T5, mT5, umT5, BART and other models with a decoder; the text tower of CLAP and its
    like; and the whole of other models.

    Args:
        name: hub id, local folder, or folder of a saved `TextToWaveformPipeline`.
        dtype: type of the weights, whatever type they were saved in.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the weights.

    Returns:
        The encoder in evaluation mode, and its tokenizer.

    Raises:
        ValueError: if there is no such model, it has no tokenizer, or weights of the encoder are missing.
    """
    from transformers import AutoConfig, AutoTokenizer

    weights_type = getattr(torch, dtype, None)
    if not isinstance(weights_type, torch.dtype):
        raise ValueError(f"dtype: {dtype!r} is not a torch type such as float32 or bfloat16")
    source: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    model_name, tokenizer_name = name, name
    if (Path(name) / "text_encoder").is_dir():
        model_name, tokenizer_name = str(Path(name) / "text_encoder"), str(Path(name) / "tokenizer")
    try:
        config = AutoConfig.from_pretrained(model_name, **source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"name: {name!r} is neither a model on the hub nor a local folder with one; give a name such as "
            "xlm-roberta-base, or a folder written by save_pretrained"
        ) from error
    no_tokenizer = f"name: {name!r} has no tokenizer; save the tokenizer of the encoder into the same folder"
    if Path(tokenizer_name).is_dir() and not _has_tokenizer(Path(tokenizer_name)):
        raise ValueError(no_tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **source)
    except (OSError, ValueError) as error:
        raise ValueError(no_tokenizer) from error
    model_class = _encoder_class(config, trust_remote_code)
    try:
        with _quiet_transformers():  # it reports weights of the parts that are left out; what matters is checked below
            model, report = model_class.from_pretrained(
                model_name, config=config, dtype=weights_type, output_loading_info=True, **source
            )
    except OSError as error:
        raise ValueError(f"name: {name!r} has no weights; give a folder written by save_pretrained") from error
    encoder = _text_part(model)
    own = {id(parameter) for parameter in encoder.parameters()}
    names = {key for key, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}
    missing = sorted(key for key in report["missing_keys"] if key in names and "pooler" not in key)
    if missing:
        raise ValueError(
            f"name: {name!r} lacks {len(missing)} weights of the text encoder, for example {missing[0]!r}; give a "
            "model that was saved with them"
        )
    if "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters:
        encoder.pooler = None  # many checkpoints have none, and it would be a trained layer without gradients
    if (limit := _positions(encoder)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return encoder.eval(), tokenizer


def _positions(encoder: Any) -> int | None:  # noqa: ANN401
    """Most tokens that an encoder can read, or None if there is no such limit."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    # RoBERTa and its like count positions from behind the number of the padding.
    first = getattr(getattr(encoder, "embeddings", None), "padding_idx", None)
    return positions if first is None else positions - first - 1


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer; transformers may make up an empty one where there are none."""
    return any(path for pattern in ("*token*", "vocab*", "*.model") for path in folder.glob(pattern))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _encoder_class(config: Any, trust_remote_code: bool) -> Any:  # noqa: ANN401
    """Class to load: an encoder without the decoder where the family has one, else the whole model."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    whole = MODEL_MAPPING_NAMES.get(config.model_type)
    if not isinstance(whole, str) or (trust_remote_code and getattr(config, "auto_map", None)):
        return transformers.AutoModel
    # A half that was saved by itself names its class, for example BartEncoder.
    module = importlib.import_module(getattr(transformers, whole).__module__)
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    if saved_as.endswith(("Encoder", "EncoderModel", "TextModel")) and hasattr(module, saved_as):
        return getattr(module, saved_as)
    half = f"{whole.removesuffix('Model')}EncoderModel"
    return getattr(transformers, half, transformers.AutoModel)


def _text_part(model: Any) -> Any:  # noqa: ANN401
    from transformers import PreTrainedModel

    if isinstance(tower := getattr(model, "text_model", None), PreTrainedModel):
        return tower
    if getattr(model.config, "is_encoder_decoder", False) and getattr(model, "decoder", None) is not None:
        return model.get_encoder()
    return model


def text_width(encoder: nn.Module) -> int:
    """E of an encoder.

    Args:
        encoder: a model with a Hugging Face configuration.

    Returns:
        Width of its last states.

    Raises:
        ValueError: if the configuration does not tell.
    """
    config: Any = encoder.config
    for name in ("d_model", "hidden_size", "n_embd", "dim"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    raise ValueError(f"text: the configuration of {type(encoder).__name__} does not tell its width; set text_dim")


def encoder_identity(encoder: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Fingerprint of an encoder and its vocabulary, equal wherever they were loaded from.

    Args:
        encoder: up to 64 values of every weight are looked at.
        tokenizer: all of its tokens are.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(type(encoder).__name__.encode())
    for key, tensor in sorted(encoder.state_dict().items()):
        if "pooler" in key:  # not used, hence in any state
            continue
        values = tensor.detach().flatten()
        picked = values[:: max(1, len(values) // 64)].double().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} ".encode() + picked.numpy().tobytes())
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number} {token!r}\n".encode())
    return digest.hexdigest()[:32]


# -- recipes -----------------------------------------------------------------------------------------------------------


class TextRecipe(ABC):
    """Recipe for a text encoder and its tokenizer; plain data that YAML and checkpoints can hold."""

    pooling: Pooling = "auto"
    max_tokens: int = 128
    reproducible = True
    """Whether building again gives the same weights; otherwise a frozen encoder belongs in the checkpoint."""

    @abstractmethod
    def build(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Make the encoder, in training mode, and its tokenizer."""


@dataclass
class PretrainedText(TextRecipe):
    """An encoder by hub id or local folder; see `load_text_encoder` for what is taken of larger models.

    Args:
        name: hub id, local folder, or folder of a saved pipeline.
        pooling: how a text becomes one vector: "first" takes the class token, "mean" the mean of all tokens, "auto"
            the class token if there is one.
        max_tokens: most tokens of a text; longer ones are cut.
        dtype: type of the weights, whatever type they were saved in.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the weights.

    Raises:
        ValueError: if `pooling` is unknown or `max_tokens` below 1.
    """

    name: str
    pooling: Pooling = "auto"
    max_tokens: int = 128
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_text_options(self.pooling, self.max_tokens)

    def build(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the encoder, put it into training mode, and load its tokenizer."""
        encoder, tokenizer = load_text_encoder(self.name, self.dtype, self.revision, self.trust_remote_code)
        return encoder.train(), tokenizer


@dataclass
class SmallText(TextRecipe):
    """A T5 encoder with random weights, small enough to be trained along on a CPU.

    Args:
        tokenizer: folder written by `save_pretrained` (see `word_tokenizer`), hub id, or "byt5" for bytes.
        d_model: E.
        num_layers: number of layers.
        num_heads: attention heads.
        d_kv: width of a head.
        d_ff: width inside the feed-forward layers.
        dropout: rate in all layers.
        max_tokens: most tokens of a text; longer ones are cut. Bytes need more of them than words.
        pooling: see `PretrainedText`.

    Raises:
        ValueError: if an option is out of its range.
    """

    tokenizer: str
    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 4
    d_kv: int = 16
    d_ff: int = 128
    dropout: float = 0.0
    max_tokens: int = 20
    pooling: Pooling = "mean"
    reproducible = False

    def __post_init__(self) -> None:
        check_text_options(self.pooling, self.max_tokens)
        for name in ("d_model", "num_layers", "num_heads", "d_kv", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")

    def build(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the tokenizer and make the encoder, in training mode.

        Raises:
            ValueError: if there is no such tokenizer.
        """
        from transformers import AutoTokenizer, ByT5Tokenizer, T5Config, T5EncoderModel

        tokenizer: PreTrainedTokenizerBase
        if self.tokenizer == BYTES:
            tokenizer = ByT5Tokenizer()
        else:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"tokenizer: {self.tokenizer!r} is neither a folder with a tokenizer nor one on the hub; use "
                    f"{BYTES}, or what lit_models.diffusion.text.word_tokenizer(texts).save_pretrained(folder) wrote"
                ) from error
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=self.d_model,
            d_kv=self.d_kv,
            d_ff=self.d_ff,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            dropout_rate=self.dropout,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return T5EncoderModel(config).train(), tokenizer


def word_tokenizer(texts: Iterable[str], min_count: int = 2) -> "PreTrainedTokenizerFast":
    """Tokenizer whose tokens are the words and signs of texts, in lower case.

    Scripts that are written without spaces give whole sentences as words; use "byt5" or a pretrained one for those.

    Args:
        texts: of training.
        min_count: how often a word must occur; others become unknown.

    Returns:
        The tokenizer: number 0 is padding, 1 unknown words, then the words, frequent ones first. It adds no tokens
        around a text. Keep it with its `save_pretrained`.

    Raises:
        ValueError: if no word is frequent enough.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import NFKC, Lowercase
    from tokenizers.normalizers import Sequence as Normalizers
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = Normalizers([NFKC(), Lowercase()]), Whitespace()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    frequent = (word for word, count in counts.items() if count >= min_count)
    words = sorted(frequent, key=lambda word: (-counts[word], word))
    if not words:
        raise ValueError(f"min_count: no word occurs {min_count} times in the texts; give more texts or lower it")
    vocabulary = {word: number for number, word in enumerate([PADDING, UNKNOWN, *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    model.normalizer, model.pre_tokenizer = normalizer, splitter  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=PADDING, unk_token=UNKNOWN)


# -- cache -------------------------------------------------------------------------------------------------------------


class TextCache:
    """States of texts from an encoder that is not trained, each computed once.

    Args:
        identity: of the encoder, see `encoder_identity`.
        pooling: "first" or "mean".
        max_tokens: most tokens of a text.
        megabytes: memory for states; the latest used ones stay. 0 keeps none.
        folder: folder of files that runs and processes may share; None keeps states in memory only.

    Raises:
        ValueError: if the memory is negative.

    Example::

        cache = TextCache(encoder_identity(encoder, tokenizer), pooling="mean", max_tokens=128)
        states = cache(["a slow waltz", "a reel"], lambda texts: encode_texts(encoder, tokenizer, texts, "mean", 128))
    """

    def __init__(
        self,
        identity: str,
        pooling: Pooling,
        max_tokens: int,
        megabytes: float = 256.0,
        folder: str | Path | None = None,
    ) -> None:
        if megabytes < 0:
            raise ValueError(f"text_cache_mb: {megabytes} is negative; use 0 to keep nothing in memory")
        self.key = f"{identity} {pooling} {max_tokens}"
        self.limit = int(megabytes * 2**20)
        self.folder = None if folder is None else Path(folder)
        self.computed = 0
        """Texts that were encoded, not found."""
        self._texts: OrderedDict[str, TextStates] = OrderedDict()
        self._bytes = 0

    def __call__(self, texts: Sequence[str], compute: Callable[[list[str]], TextStates]) -> TextStates:
        """States of texts.

        Args:
            texts: B texts, repeated ones too.
            compute: encodes one text that is not known. It is asked for one text at a time, so that what is kept does
                not depend on which texts came together.

        Returns:
            The states on the CPU, padded to the longest of the batch.
        """
        rows: dict[str, TextStates] = {}
        for text in dict.fromkeys(texts):
            row = self._find(text)
            if row is None:
                states = TextStates(*(part.detach().cpu() for part in compute([text])))
                length = int(states.mask.sum())
                row = TextStates(states.vector, states.states[:, :length].clone(), states.mask[:, :length].clone())
                self.computed += 1
                self._keep(text, row)
                if self.folder is not None:
                    self._write(self._path(self.folder, text), row)
            rows[text] = row
        return stack_texts([rows[text] for text in texts])

    def _find(self, text: str) -> TextStates | None:
        if text in self._texts:
            self._texts.move_to_end(text)
            return self._texts[text]
        if self.folder is None:
            return None
        row = self._read(self._path(self.folder, text))
        if row is not None:
            self._keep(text, row)
        return row

    def _keep(self, text: str, row: TextStates) -> None:
        size = sum(part.nbytes for part in row)
        if size > self.limit:
            return
        self._texts[text] = row
        self._bytes += size
        while self._bytes > self.limit:
            self._bytes -= sum(part.nbytes for part in self._texts.popitem(last=False)[1])

    def _path(self, folder: Path, text: str) -> Path:
        name = hashlib.sha256(f"{self.key}\n{text}".encode()).hexdigest()[:40]
        return folder / name[:2] / f"{name}.safetensors"

    @staticmethod
    def _read(path: Path) -> TextStates | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not path.is_file():
            return None
        try:
            stored = load(path.read_bytes())
            return TextStates(stored["vector"], stored["states"], stored["mask"])
        except (SafetensorError, KeyError):
            return None  # damaged, hence computed and written again

    @staticmethod
    def _write(path: Path, row: TextStates) -> None:
        from safetensors.torch import save

        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(save(row._asdict()))
        os.replace(temporary, path)  # other processes see a whole file or none
