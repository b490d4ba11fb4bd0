import json

import pytest


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def word_tokenizer(folder, bos):
    """Save a tokenizer of single words: <pad> 0, <bos> 1, <eos> 2, <unk> 3, a 4, b 5, ... j 13."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Folder of a tokenizer of single words that adds <bos>."""
    return word_tokenizer(tmp_path_factory.mktemp("words"), True)


@pytest.fixture(scope="session")
def words_without_bos(tmp_path_factory):
    """Folder of a tokenizer of single words that adds nothing."""
    return word_tokenizer(tmp_path_factory.mktemp("plain_words"), False)


@pytest.fixture
def write(tmp_path):
    """Function that writes rows to a JSONL file and gives its path."""

    def to_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return to_file
