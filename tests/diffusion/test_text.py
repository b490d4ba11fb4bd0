import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import datamodules
from datamodules.assets import asset_path
from lit_models.diffusion import text as text_module
from lit_models.diffusion.text import (
    PretrainedText,
    SmallText,
    TextCache,
    TextStates,
    cut_texts,
    encode,
    encode_texts,
    encoder_identity,
    load_text_encoder,
    pool,
    resolve_pooling,
    stack_texts,
    text_width,
    tokenize,
    without_dropout,
    word_tokenizer,
)
from lit_models.hyperparameters import plain

WORDS = ["a", "slow", "fast", "waltz", "reel", "on", "the", "harp", "flute", "in", "d", "minor"]
TEXTS = ["a slow waltz on the harp in d minor", "reel", "", "a fast reel in d"]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def words(class_token=True, side="right", end=False):
    """Word-level tokenizer that puts [CLS] before and [SEP] behind a text, only [SEP] (`end`), or neither."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    model = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(SPECIAL)
    if class_token:
        model.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    else:
        special.pop("cls_token")
        if end:
            model.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, padding_side=side, **special)


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
BART = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CLAP_AUDIO = {
    "hidden_size": 16,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "patch_embeds_hidden_size": 8,
    "num_mel_bins": 64,
    "spec_size": 64,
}


def clap():
    tower = {**SMALL, "pad_token_id": 0, "projection_dim": 8}
    return transformers.ClapModel(transformers.ClapConfig(text_config=tower, audio_config=CLAP_AUDIO, projection_dim=8))


# Name, function that makes the whole model, function that takes what reads text, and how texts become vectors.
ENCODERS = {
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), lambda m: m.bert, "first"),
    "xlm-roberta": (
        lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**SMALL, pad_token_id=0)),
        lambda m: m,
        "first",
    ),
    "distilbert": (
        lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=16)
        ),
        lambda m: m,
        "first",
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        lambda m: m.get_encoder(),
        "mean",
    ),
    "mt5": (lambda: transformers.MT5Model(transformers.MT5Config(**T5)), lambda m: m.get_encoder(), "mean"),
    "umt5": (lambda: transformers.UMT5Model(transformers.UMT5Config(**T5)), lambda m: m.get_encoder(), "mean"),
    "t5-encoder": (lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)), lambda m: m, "mean"),
    "bart": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
        lambda m: m.get_encoder(),
        "first",
    ),
    "mbart": (lambda: transformers.MBartModel(transformers.MBartConfig(**BART)), lambda m: m.get_encoder(), "mean"),
    "bart-encoder": (
        lambda: transformers.BartModel(transformers.BartConfig(**BART)).get_encoder(),
        lambda m: m,
        "first",
    ),
    "clap": (clap, lambda m: m.text_model, "first"),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        ),
        lambda m: m.transformer,
        "mean",
    ),
}


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """Function that saves one of `ENCODERS` with a tokenizer, and gives the folder and the model."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(3)
            build, _, pooling = ENCODERS[name]
            model = build().eval()
            with torch.no_grad():  # norms and biases that are not trivial
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            words(pooling == "first", end=True).save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return make


# -- encoders of all kinds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_any_encoder_gives_the_states_of_its_text_part(name, encoder_folder):
    folder, model = encoder_folder(name)
    encoder, tokenizer = load_text_encoder(str(folder))
    assert not encoder.training
    assert resolve_pooling("auto", tokenizer) == ENCODERS[name][2]
    assert text_width(encoder) == 16
    states = encode_texts(encoder, tokenizer, TEXTS, max_tokens=20)
    assert states.vector.dtype == states.states.dtype == torch.float32
    assert states.mask.dtype == torch.bool
    assert states.vector.shape == (4, 16)
    assert states.states.shape == (*states.mask.shape, 16)
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"] or [tokenizer.pad_token_id]
        assert states.mask[row].sum() == len(ids)
        alone = ENCODERS[name][1](model)(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long())
        expected = alone.last_hidden_state[0]
        torch.testing.assert_close(states.states[row, : len(ids)], expected, atol=1e-5, rtol=0)
        assert not states.states[row, len(ids) :].any()
        vector = expected[0] if ENCODERS[name][2] == "first" else expected.mean(0)
        torch.testing.assert_close(states.vector[row], vector, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_no_weight_goes_untrained(name, encoder_folder):
    encoder, tokenizer = load_text_encoder(str(encoder_folder(name)[0]))
    states = encode_texts(encoder, tokenizer, TEXTS)
    (states.vector.sum() + states.states.square().sum()).backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "clap"])
def test_nothing_but_the_text_part_is_kept(name, encoder_folder):
    folder, model = encoder_folder(name)
    encoder, _ = load_text_encoder(str(folder))
    assert sum(p.numel() for p in encoder.parameters()) < sum(p.numel() for p in model.parameters())
    assert not any("decoder" in key or "audio" in key for key, _ in encoder.named_modules())


def test_encoders_may_be_bfloat16(encoder_folder):
    folder, _ = encoder_folder("bert")
    encoder, tokenizer = load_text_encoder(str(folder), dtype="bfloat16")
    assert encoder.dtype == torch.bfloat16
    states = encode_texts(encoder, tokenizer, TEXTS)
    assert states.vector.dtype == states.states.dtype == torch.float32
    exact = encode_texts(*load_text_encoder(str(folder)), TEXTS)
    torch.testing.assert_close(states.vector, exact.vector, atol=0.1, rtol=0.1)


def test_autocast_gives_float32(encoder_folder):
    encoder, tokenizer = load_text_encoder(str(encoder_folder("t5")[0]))
    with torch.autocast("cpu", torch.bfloat16):
        states = encode_texts(encoder, tokenizer, TEXTS)
    assert states.vector.dtype == states.states.dtype == torch.float32


def test_gradients_reach_the_encoder():
    encoder, tokenizer = SmallText("byt5").build()
    encode_texts(encoder, tokenizer, ["harp", ""]).vector.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_padding_does_not_matter(side, encoder_folder):
    encoder, _ = load_text_encoder(str(encoder_folder("bert")[0]))
    exact = encode_texts(encoder, words(), TEXTS)
    for one, other in zip(encode_texts(encoder, words(side=side), TEXTS), exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_what_is_not_there_is_an_error(tmp_path, encoder_folder):
    with pytest.raises(ValueError, match=r"name: .*nowhere.* neither"):
        load_text_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="dtype: 'float33'"):
        load_text_encoder("x", dtype="float33")
    _, model = encoder_folder("t5")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_text_encoder(str(tmp_path / "bare"))
    words().save_pretrained(tmp_path / "empty")
    model.config.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="has no weights"):
        load_text_encoder(str(tmp_path / "empty"))


def test_missing_weights_are_an_error_and_a_missing_pooler_is_not(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**SMALL))
    words().save_pretrained(tmp_path)
    state = {key: value for key, value in model.state_dict().items() if "pooler" not in key}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    encoder, tokenizer = load_text_encoder(str(tmp_path))
    encode_texts(encoder, tokenizer, TEXTS).vector.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())  # none that training would miss
    del state["encoder.layer.1.output.dense.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weights .*encoder\.layer\.1\.output\.dense\.weight"):
        load_text_encoder(str(tmp_path))


@pytest.mark.filterwarnings("ignore:max_tokens")
@pytest.mark.parametrize(("kind", "limit"), [("Bert", 12), ("XLMRoberta", 11)])
def test_texts_are_cut_to_what_the_encoder_can_read(kind, limit, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**SMALL, pad_token_id=0, max_position_embeddings=12)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    assert encode_texts(*load_text_encoder(str(tmp_path)), ["a reel " * 20]).mask.shape == (1, limit)


# -- pooling -----------------------------------------------------------------------------------------------------------


def test_pooling_against_numbers():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]]).expand(4, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    mean = torch.tensor([[2.0, 4.0], [51.5, 53.0], [104 / 3, 36.0], [0.0, 0.0]])
    torch.testing.assert_close(pool(states, mask, "mean"), mean)
    torch.testing.assert_close(pool(states, mask.bool(), "mean"), mean)
    first = torch.tensor([[1.0, 2.0], [3.0, 6.0], [1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(pool(states, mask, "first"), first)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_may_hold_anything(pooling):
    states = torch.randn(2, 5, 3).bfloat16()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    clean = pool(states, mask, pooling)
    states[~mask.bool()] = torch.nan
    assert clean.dtype == torch.float32
    torch.testing.assert_close(pool(states, mask, pooling), clean)
    assert not clean.isnan().any()


def test_pooling_is_checked():
    with pytest.raises(ValueError, match="pooling: 'last' is unknown"):
        resolve_pooling("last", words())
    with pytest.raises(ValueError, match="pooling: 'auto' is neither first nor mean"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), "auto")


def test_a_class_token_that_does_not_come_first_is_not_taken():
    tokenizer = words(class_token=False, end=True)
    tokenizer.cls_token = "[SEP]"
    assert resolve_pooling("auto", tokenizer) == "mean"
    assert resolve_pooling("first", tokenizer) == "first"


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_cut(monkeypatch):
    monkeypatch.setattr(text_module._CutTexts, "number", 0)


def test_long_texts_are_cut_with_one_warning_that_counts(nothing_cut):
    tokenizer = words()
    texts = ["a slow waltz on the harp", "reel", "a fast reel on the flute"]
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than 5 tokens and were cut"):
        tokens = tokenize(tokenizer, texts, 5)
    names = [tokenizer.convert_ids_to_tokens(row) for row in tokens["input_ids"].tolist()]
    assert names[0] == ["[CLS]", "a", "slow", "waltz", "[SEP]"]
    assert names[1] == ["[CLS]", "reel", "[SEP]", "[PAD]", "[PAD]"]
    assert tokens["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1] * 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(tokenizer, texts, 4)
        tokenize(tokenizer, texts, 20)
    assert cut_texts() == 4


def test_the_tokenizers_own_limit_counts(nothing_cut):
    tokenizer = words()
    tokenizer.model_max_length = 4
    with pytest.warns(UserWarning, match="1 of 1 texts is longer than 4 tokens and was cut"):
        assert tokenize(tokenizer, ["a slow waltz on the harp"], 128)["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("limit", [1, 2])
def test_limits_that_only_hold_what_is_around_a_text(limit, nothing_cut):
    with pytest.warns(UserWarning, match="cut"):
        tokens = tokenize(words(), ["a slow waltz", "reel"], limit)
    assert tokens["input_ids"].shape == (2, limit)
    assert tokens["attention_mask"].all()


def test_an_empty_text_has_a_token():
    bare = words(class_token=False)
    tokens = tokenize(bare, ["", "reel on the harp"], 10)
    assert tokens["input_ids"][0].tolist() == [0, 0, 0, 0]
    assert tokens["attention_mask"][0].tolist() == [1, 0, 0, 0]
    assert tokenize(bare, [""], 10)["attention_mask"].tolist() == [[1]]
    assert tokenize(words(), [""], 10)["input_ids"].tolist() == [[2, 3]]


def test_a_tokenizer_without_padding_is_fine():
    tokenizer = words(class_token=False)
    tokenizer.pad_token = None
    assert tokenize(tokenizer, ["reel", "a reel"], 10)["attention_mask"].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("texts", [[], "reel", ["reel", None], [3]])
def test_what_is_no_text_is_an_error(texts):
    with pytest.raises(ValueError, match="texts: "):
        tokenize(words(), texts, 10)


def test_dropout_is_off_only_for_a_while():
    encoder, tokenizer = SmallText("byt5", dropout=0.5).build()
    encoder.encoder.final_layer_norm.eval()
    with without_dropout(encoder):
        one, other = (encode_texts(encoder, tokenizer, ["harp"]).vector for _ in range(2))
    assert torch.equal(one, other)
    assert encoder.training
    assert not encoder.encoder.final_layer_norm.training


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_recipes_are_plain_data(encoder_folder):
    small = SmallText("byt5", d_model=32)
    assert plain(small)["class_path"] == "lit_models.diffusion.text.SmallText"
    assert SmallText(**plain(small)["init_args"]) == small
    assert not small.reproducible
    recipe = PretrainedText(str(encoder_folder("bert")[0]), max_tokens=7)
    assert PretrainedText(**plain(recipe)["init_args"]) == recipe
    assert recipe.reproducible
    one, other = (recipe.build()[0] for _ in range(2))
    assert one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_small_encoder_has_the_sizes_asked_for(tmp_path):
    word_tokenizer(["a slow reel", "a fast reel"], min_count=1).save_pretrained(tmp_path)
    encoder, tokenizer = SmallText(str(tmp_path)).build()
    assert (len(tokenizer), text_width(encoder)) == (6, 64)
    assert (
        sum(parameter.numel() for parameter in encoder.parameters())
        == 6 * 64 + 32 * 4 + 2 * (4 * 64 * 64 + 2 * 64 * 128 + 2 * 64) + 64
    )
    assert encode_texts(encoder, tokenizer, ["a reel"]).vector.shape == (1, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "last"}, "pooling: 'last'"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"num_heads": 0}, "num_heads: 0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SmallText("byt5", **options)


def test_a_missing_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: .*nowhere"):
        SmallText(str(tmp_path / "nowhere")).build()


# -- words -------------------------------------------------------------------------------------------------------------


def test_words_are_those_that_are_frequent(tmp_path):
    tokenizer = word_tokenizer(["A reel, in F#", "a REEL in 6/8", "one waltz"])
    assert tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "a": 2, "in": 3, "reel": 4}
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("ａ Reel waltz in")["input_ids"] == [2, 4, 1, 3]
    assert (loaded.pad_token_id, loaded.cls_token) == (0, None)


def test_texts_without_frequent_words_are_an_error():
    with pytest.raises(ValueError, match="min_count: no word occurs 2 times"):
        word_tokenizer(["a reel", ""])


def test_the_shipped_words_are_those_of_the_built_in_tunes(tmp_path):
    readme = Path(asset_path("folk_words/README.md")).read_text()
    program = re.search(r"python - <<'END'\n(.*?)\nEND", readme, re.DOTALL)[1]
    exec(program.replace('"datamodules/assets/folk_words"', repr(str(tmp_path))), {})
    shipped, rebuilt = (transformers.AutoTokenizer.from_pretrained(p) for p in (asset_path("folk_words"), tmp_path))
    assert shipped.get_vocab() == rebuilt.get_vocab()
    data = datamodules.FolkWave(length=1000, prompt_format="mixed")
    data.setup("fit")
    texts = [data.build("train").text((row, 0, 0)) for row in range(20)]
    assert shipped.unk_token_id not in {number for row in shipped(texts)["input_ids"] for number in row}


# -- cache -------------------------------------------------------------------------------------------------------------


class Counted:
    """Encoder that remembers what it was asked for."""

    def __init__(self):
        self.calls = []
        self.encoder, self.tokenizer = SmallText("byt5").build()
        self.encoder.eval()

    def __call__(self, texts):
        self.calls.append(texts)
        with torch.no_grad():
            return encode_texts(self.encoder, self.tokenizer, texts, max_tokens=20)


@pytest.fixture(scope="module")
def counted():
    torch.manual_seed(0)
    return Counted()


@pytest.mark.filterwarnings("ignore:max_tokens")
def test_each_text_is_encoded_once(counted):
    counted.calls.clear()
    cache = TextCache("id", "mean", 20)
    states = cache(TEXTS, counted)
    assert counted.calls == [[text] for text in TEXTS]
    for one, other in zip(states, counted(TEXTS), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    counted.calls.clear()
    again = cache(["reel", "reel", "new"], counted)
    assert counted.calls == [["new"]]
    assert cache.computed == 5
    assert again.states.shape == (3, 5, 64)  # bytes, and the end of the text
    # Not a bit depends on which texts came together.
    for one, other in zip(again, TextCache("id", "mean", 20)(["reel", "reel", "new"], counted), strict=True):
        assert torch.equal(one, other)


def test_memory_is_limited(counted):
    counted.calls.clear()
    size = sum(part.nbytes for part in counted(["reel"]))
    cache = TextCache("id", "mean", 20, megabytes=2.5 * size / 2**20)
    for text in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb"):
        cache([text], counted)
    assert counted.calls[1:] == [["aaaa"], ["bbbb"], ["cccc"], ["bbbb"]]  # the latest used ones stay
    none = TextCache("id", "mean", 20, megabytes=0)
    none(["aaaa"], counted)
    none(["aaaa"], counted)
    assert none.computed == 2
    with pytest.raises(ValueError, match="text_cache_mb: -1"):
        TextCache("id", "mean", 20, megabytes=-1)


def test_states_are_shared_through_a_folder(tmp_path, counted):
    first = TextCache("id", "mean", 20, folder=tmp_path)
    states = first(TEXTS, counted)
    counted.calls.clear()
    second = TextCache("id", "mean", 20, folder=tmp_path)
    for one, other in zip(second(TEXTS, counted), states, strict=True):
        assert torch.equal(one, other)
    assert counted.calls == []
    for other in (("else", "mean", 20), ("id", "first", 20), ("id", "mean", 21)):
        TextCache(*other, folder=tmp_path)(["reel"], counted)
    assert counted.calls == [["reel"]] * 3
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    TextCache("id", "mean", 20, folder=tmp_path)(["reel"], counted)
    assert len(counted.calls) == 4


def test_the_identity_is_that_of_weights_and_words(counted, tmp_path):
    identity = encoder_identity(counted.encoder, counted.tokenizer)
    counted.encoder.save_pretrained(tmp_path)
    copy = transformers.T5EncoderModel.from_pretrained(tmp_path)
    assert encoder_identity(copy, counted.tokenizer) == identity
    assert encoder_identity(copy, words()) != identity
    with torch.no_grad():
        copy.encoder.final_layer_norm.weight[3] += 1
    assert encoder_identity(copy, counted.tokenizer) != identity


def test_texts_are_stacked():
    one = TextStates(torch.ones(1, 2), torch.ones(1, 3, 2), torch.ones(1, 3).bool())
    other = TextStates(torch.zeros(2, 2), torch.zeros(2, 1, 2), torch.ones(2, 1).bool())
    both = stack_texts([one, other])
    assert both.mask.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert both.states.shape == (3, 3, 2)
    assert torch.equal(both.repeat_interleave(2).vector[:, 0], torch.tensor([1.0, 1, 0, 0, 0, 0]))


def test_encode_takes_tokens(counted):
    tokens = tokenize(counted.tokenizer, ["reel"], 20)
    with torch.no_grad():
        assert torch.equal(encode(counted.encoder, tokens, "mean").vector, counted(["reel"]).vector)
