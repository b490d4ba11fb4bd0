"""One way to load a tokenizer, shared by models and data."""

from typing import TYPE_CHECKING

from lit_models.gguf import find_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(name: str, pad_token: str | None = None) -> "PreTrainedTokenizerBase":
    """Load a tokenizer whose padding and end-of-sequence tokens are usable for training.

    Args:
        name: hub id, local folder, GGUF file, or `gguf:PACKAGE` for the GGUF file that an installed package ships.
        pad_token: token of the vocabulary used as padding instead of the tokenizer's own.

    Returns:
        The fast tokenizer where one exists.

    Raises:
        ValueError: if there is no such tokenizer, `pad_token` is not in its vocabulary, there is no
            end-of-sequence token, no padding token, or both are the same token.
    """
    from transformers import AutoTokenizer

    gguf = None
    if name.startswith("gguf:"):
        gguf = find_gguf(package=name.removeprefix("gguf:"))
    elif name.endswith(".gguf"):
        gguf = find_gguf(name)
    try:
        if gguf is not None:
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"tokenizer: {name!r} is neither a tokenizer on the hub nor a local folder with one; "
            "give a hub id or a path to a folder saved by save_pretrained"
        ) from error
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token: {pad_token!r} is not in the vocabulary of tokenizer {name!r}; name one that is"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name!r} has no end-of-sequence token, so generation could never stop")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"pad_token: tokenizer {name!r} has no padding token; set pad_token to an unused token of its vocabulary"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"pad_token: tokenizer {name!r} pads with its end-of-sequence token {tokenizer.eos_token!r}, which would "
            "hide where responses end; set pad_token to another token of its vocabulary"
        )
    return tokenizer


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Make sure that a model embeds every token of a tokenizer.

    Args:
        tokenizer: the tokenizer of the data.
        model: the network that reads its ids.

    Raises:
        ValueError: if there are more tokens than embeddings.
    """
    rows: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    if len(tokenizer) > rows:
        raise ValueError(
            f"model.tokenizer: {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, but {type(model).__name__} "
            f"embeds only {rows}; use the tokenizer that belongs to the model"
        )
