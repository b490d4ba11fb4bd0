"""Gradients of single examples, and what is made of them."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lit_models.influence.cache import RowCache, digest_of
from lit_models.influence.checkpoints import read_checkpoint, state_of
from lit_models.influence.examples import Examples, pad_and_stack
from lit_models.influence.gradients import GradientOptions, PerSampleGradients, Projection, chosen_parameters
from lit_models.influence.tracin import (
    checkpoint_of_step,
    estimate,
    fit_scale,
    grad_cos,
    grad_dot,
    predict_trajectory,
    tracin_cp,
    tracin_self,
    trajectory_influence,
    trajectory_scale,
)


def classification_loss(model, example):
    pixels, label = example
    return F.cross_entropy(model(pixels[None]), label[None])


class Classifier(nn.Module):
    """Two layers, with dropout and a scalar parameter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(8, 3)

    def forward(self, pixels):
        return self.head(self.scale * self.body(pixels))


class Stubborn(Classifier):
    """Looks at values, which vmap can't."""

    def forward(self, pixels):
        return super().forward(pixels) * (2.0 if bool(pixels.sum() > 0) else 1.0)


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture
def digits():
    """9 train and 4 test examples."""
    draws = torch.Generator().manual_seed(1)
    pixels, labels = torch.randn(13, 6, generator=draws), torch.randint(3, (13,), generator=draws)
    return (pixels[:9], labels[:9]), (pixels[9:], labels[9:])


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    config.pad_token_id = 7  # one of the tokens in the texts
    return GPT2LMHeadModel(config)  # in training mode, with dropout


@pytest.fixture
def texts():
    """Five texts of 4 to 9 tokens with prompts of 2."""
    draws = torch.Generator().manual_seed(2)
    rows = []
    for length in (9, 4, 6, 9, 5):
        ids = torch.randint(3, 23, (length,), generator=draws)
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(length) < 2, -100, ids), "text": "…"})
    return rows


def by_backward(model, losses):
    """Gradients of some losses over all parameters, one backward pass each, with the modes of evaluation."""
    rows = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows)


def classifier_gradients(model, batch):
    model = copy.deepcopy(model).eval()
    return by_backward(model, (classification_loss(model, row) for row in zip(*batch, strict=True)))


def text_gradients(model, rows):
    model = copy.deepcopy(model).eval()
    return by_backward(
        model, (model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss for row in rows)
    )


def classify(model, **options):
    return PerSampleGradients(model, classification_loss, GradientOptions(**options))


def near(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected.to(actual), rtol=tolerance, atol=tolerance)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_of_any_module(classifier, digits):
    train, test = digits
    source = classify(classifier)
    near(source.matrix(train), classifier_gradients(classifier, train))
    near(source.norms(train), classifier_gradients(classifier, train).norm(dim=1))
    near(
        grad_dot(source, train, test),
        classifier_gradients(classifier, train) @ classifier_gradients(classifier, test).T,
    )
    assert not source.loops


@pytest.mark.parametrize("form", ["list of tuples", "list of dicts", "dict"])
def test_examples_in_any_form(classifier, digits, form):
    pixels, labels = digits[0]

    def loss(model, example):
        return classification_loss(model, (example["pixels"], example["label"]))

    if form == "list of tuples":
        source, data = classify(classifier), [(p.tolist(), int(n)) for p, n in zip(pixels, labels, strict=True)]
    else:
        source, data = PerSampleGradients(classifier, loss), {"pixels": pixels, "label": labels}
        if form == "list of dicts":
            data = [{"pixels": p, "label": n} for p, n in zip(pixels, labels, strict=True)]
    near(source.matrix(data), classify(classifier).matrix(digits[0]))


def test_model_is_left_alone(classifier, digits):
    classifier.head.eval()
    before, modes = copy.deepcopy(classifier.state_dict()), [module.training for module in classifier.modules()]
    state = torch.get_rng_state()
    with torch.no_grad():
        first = classify(classifier).matrix(digits[0])
    with torch.autocast("cpu", torch.bfloat16):
        second = classify(classifier).matrix(digits[0], before)
    assert torch.equal(first, second)
    assert [module.training for module in classifier.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"max_grad_elements": 1}])
@pytest.mark.parametrize("side", ["train", "test"])
def test_chunks_change_nothing(classifier, digits, options, side):
    train, test = digits if side == "train" else digits[::-1]
    whole, pieces = classify(classifier), classify(classifier, **options)
    for score in (grad_dot, grad_cos):
        near(score(pieces, train, test), score(whole, train, test))
        near(score(pieces, train, test, aggregate=True), score(whole, train, test).sum(1))
    near(pieces.matrix(train), whole.matrix(train))
    near(pieces.losses(train), whole.losses(train))


@pytest.mark.parametrize("limit", [1, 500, 10_000])
def test_plan_tells_the_number_of_gradients(classifier, digits, limit, monkeypatch):
    train, test = digits
    source = classify(classifier, max_grad_elements=limit, batch_size=4)
    computed, run = [], source._run
    monkeypatch.setattr(source, "_run", lambda *given: computed.append(given[-1]) or run(*given))
    source.dots(train, test)
    assert sum(computed) == source.plan(9, 4).gradients == estimate(source, 1, train, test).gradients
    assert sum(computed) == {1: 4 + 9 * 4, 500: 4 + 9 * 2, 10_000: 4 + 9}[limit]


def test_unlike_sides_hold_the_cheaper_one(classifier, digits):
    source = classify(classifier, max_grad_elements=2 * 5 * classify(classifier).size)
    assert source.plan(9, 4) == (5, False, 13)
    assert source.plan(4, 9) == (5, True, 13)
    assert source.plan(12, 7) == (5, False, 7 + 12 * 2)


def test_half_precision_weights_are_computed_in_float32(classifier, digits):
    low = copy.deepcopy(classifier).bfloat16()
    found = classify(low).matrix(digits[0])
    assert found.dtype == torch.float32
    near(found, classifier_gradients(low.float(), digits[0]))


def test_double_weights_stay_double(classifier, digits):
    train, test = digits
    double = copy.deepcopy(classifier).double()
    found = classify(double).dots((train[0].double(), train[1]), (test[0].double(), test[1]))
    exact = classifier_gradients(double, (train[0].double(), train[1]))
    exact = exact @ classifier_gradients(double, (test[0].double(), test[1])).T
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_model_that_vmap_cannot_trace(digits):
    torch.manual_seed(0)
    model = Stubborn()
    source = classify(model, batch_size=4)
    with pytest.warns(UserWarning, match="one example at a time"):
        found = source.matrix(digits[0])
    near(found, classifier_gradients(model, digits[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        near(grad_dot(source, *digits), found @ source.matrix(digits[1]).T)
        losses = source.losses(digits[0])
    model.eval()
    near(losses, torch.stack([classification_loss(model, row) for row in zip(*digits[0], strict=True)]))


def test_parameters_without_effect_have_no_gradient(digits):
    for kind in (Classifier, Stubborn):
        torch.manual_seed(0)
        model = kind()
        model.unused = nn.Linear(2, 2)
        source = classify(model)
        if kind is Stubborn:
            with pytest.warns(UserWarning, match="vmap"):
                found = source.matrix(digits[0])
        else:
            found = source.matrix(digits[0])
        assert found[:, -6:].abs().max() == 0
        assert found[:, :-6].abs().min(0).values.max() > 0


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (lambda model, example: model(example[0][None]), r"one number, a \(\) tensor, for one example, got \(1, 3\)"),
        (lambda model, example: 1.0, "got float"),
        (lambda model, example: classification_loss(model, example[0]), "unpack"),
    ],
)
def test_wrong_losses_are_told(classifier, digits, loss_fn, reason):
    with pytest.raises(ValueError, match=reason):
        PerSampleGradients(classifier, loss_fn).matrix(digits[0])


def test_gradient_that_is_not_finite(classifier, digits):
    train, test = digits
    train[0][3, 2] = torch.inf
    with pytest.raises(ValueError, match="given example 3 is not finite"):
        grad_dot(classify(classifier), train, test)
    with pytest.raises(ValueError, match="test example 3 is not finite"):
        grad_dot(classify(classifier), test, train)


# -- texts -------------------------------------------------------------------------------------------------------------


def padded(rows, side, length=11):
    """Batch with padding that looks like tokens."""
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        size = len(row["input_ids"])
        given = {"input_ids": row["input_ids"], "attention_mask": torch.ones(size).long(), "labels": row["labels"]}
        for key, fill in (("input_ids", 7), ("attention_mask", 0), ("labels", 7)):
            pad = torch.full((length - size,), fill)
            batch[key].append(torch.cat([pad, given[key]] if side == "left" else [given[key], pad]))
    return {key: torch.stack(value) for key, value in batch.items()}


@pytest.mark.parametrize("form", ["list", "left", "right"])
def test_gradients_of_texts(gpt2, texts, form):
    source = PerSampleGradients(gpt2, options=GradientOptions(batch_size=2))
    data = texts if form == "list" else padded(texts, form)
    near(source.matrix(data), text_gradients(gpt2, texts))
    model = copy.deepcopy(gpt2).eval()
    losses = [model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss for row in texts]
    near(source.losses(data), torch.stack(losses).detach())
    assert not source.loops


def test_networks_of_recipes(texts):
    from lit_models.backbones import FromConfig

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = FromConfig("gpt2", {"vocab_size": 23, "n_embd": 16, "n_layer": 1, "n_head": 2, **ids}).build()
    source = PerSampleGradients(model)
    near(source.matrix(texts), text_gradients(model, texts))
    assert not source.loops


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_other_families(family, texts):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    options = {"mistral": {"sliding_window": 3, "num_key_value_heads": 2}, "llama": {"num_key_value_heads": 1}}
    config = AutoConfig.for_model(family, **sizes, num_attention_heads=2, **options.get(family, {}))
    model = AutoModelForCausalLM.from_config(config).train()
    source = PerSampleGradients(model)
    near(source.matrix(padded(texts, "left")), text_gradients(model, texts))
    assert not source.loops


def test_text_without_labels_has_no_influence(gpt2, texts):
    texts[1]["labels"] = torch.full((4,), -100)
    texts[2] = {"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}  # nothing predicts the first token
    source = PerSampleGradients(gpt2)
    assert source.losses(texts).isnan().tolist() == [False, True, True, False, False]
    dots, cosines = grad_dot(source, texts, texts), grad_cos(source, texts, texts)
    assert dots[1:3].abs().max() == dots[:, 1:3].abs().max() == cosines[1:3].abs().max() == 0
    near(dots[3:, 3:], text_gradients(gpt2, texts[3:]) @ text_gradients(gpt2, texts[3:]).T)


def test_texts_need_labels(gpt2, texts):
    for data in ([{"input_ids": row["input_ids"]} for row in texts], [row["input_ids"] for row in texts]):
        with pytest.raises(ValueError, match=r"input_ids and labels .* give loss_fn"):
            PerSampleGradients(gpt2).matrix(data)


# -- chosen parameters -------------------------------------------------------------------------------------------------


def test_chosen_parameters(gpt2, classifier):
    names = dict(gpt2.named_parameters())
    assert chosen_parameters(gpt2, "all") == list(names)
    assert chosen_parameters(gpt2, "last_layer") == ["transformer.wte.weight"]  # tied to the output
    assert chosen_parameters(gpt2, r"h\.1\.mlp\..*weight$") == [
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_proj.weight",
    ]
    assert chosen_parameters(classifier, "last_layer") == ["head.weight", "head.bias"]
    classifier.body.requires_grad_(False)
    assert chosen_parameters(classifier, "all") == ["scale", "head.weight", "head.bias"]
    assert chosen_parameters(classifier, "body.0.bias") == ["body.0.bias"]


def test_part_of_the_parameters(classifier, digits):
    whole = classifier_gradients(classifier, digits[0])
    near(classify(classifier, params="last_layer").matrix(digits[0]), whole[:, -27:])
    near(classify(classifier, params="^scale$").matrix(digits[0]), whole[:, :1])


@pytest.mark.parametrize("params", ["lora", "nowhere", "(", "all"])
def test_no_parameters(classifier, params):
    classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="params"):
        classify(classifier, params=params)


def test_adapters(gpt2, texts, tmp_path):
    from lit_models.backbones import LoRA

    model = copy.deepcopy(gpt2)
    torch.manual_seed(0)
    LoRA(r=2, alpha=4, dropout=0.5).apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    source = PerSampleGradients(model, options=GradientOptions(params="lora"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert source.names == list(trained) == chosen_parameters(model, "all")
    model.eval()
    expected = []
    for row in texts:
        loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        expected.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(trained.values()))]))
    near(source.matrix(texts), torch.stack(expected))
    # A checkpoint of adapters alone; the weights below them are those of the model.
    state = {f"net.{name}": 2 * parameter.detach() for name, parameter in trained.items()}
    torch.save({"state_dict": state}, tmp_path / "step=1.ckpt")
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(2)
    found = source.matrix(texts)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.div_(2)
    near(source.matrix(texts, tmp_path / "step=1.ckpt"), found)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def changed(model):
    torch.manual_seed(3)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.3)
    return other


def checkpoint_forms(model, folder):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "plain.safetensors")
    torch.save(state, folder / "plain.pt")
    prefixed = {f"net.{name}": value for name, value in state.items()}
    prefixed |= {f"ema.{name}": torch.zeros_like(value) for name, value in state.items()}
    torch.save({"state_dict": prefixed, "epoch": 1}, folder / "lightning.ckpt")
    yield from (model, state, {"state_dict": prefixed}, lambda: state, lambda: folder / "plain.pt")
    yield from (folder / "plain.safetensors", str(folder / "plain.pt"), folder / "lightning.ckpt")
    (folder / "folder").mkdir()
    save_file(state, folder / "folder/model.safetensors")
    yield folder / "folder"


def test_checkpoints_in_any_form(classifier, digits, tmp_path):
    other = changed(classifier)
    expected = classifier_gradients(other, digits[0])
    source = classify(classifier)
    for checkpoint in checkpoint_forms(other, tmp_path):
        near(source.matrix(digits[0], checkpoint), expected)
    near(source.matrix(digits[0]), classifier_gradients(classifier, digits[0]))


def test_checkpoint_of_the_trainer(classifier, digits, tmp_path, quiet_trainer):
    from lightning.pytorch import LightningModule
    from torch.utils.data import DataLoader, TensorDataset

    class Module(LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = quiet_trainer(max_steps=2)
    trained = copy.deepcopy(classifier)
    trainer.fit(Module(trained), DataLoader(TensorDataset(*digits[0]), batch_size=3))
    trainer.save_checkpoint(tmp_path / "step=2.ckpt")
    found = classify(classifier).matrix(digits[0], tmp_path / "step=2.ckpt")
    near(found, classifier_gradients(trained, digits[0]))
    assert (found - classify(classifier).matrix(digits[0])).abs().max() > 1e-3


def test_saved_language_model(gpt2, texts, tmp_path):
    """The tied output is not in the file."""
    other = changed(gpt2)
    other.save_pretrained(tmp_path)
    near(PerSampleGradients(gpt2).matrix(texts, tmp_path), text_gradients(other, texts))
    state = {name: value for name, value in other.state_dict().items() if name != "transformer.wte.weight"}
    near(PerSampleGradients(gpt2).matrix(texts, state), text_gradients(other, texts))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"other.weight": torch.zeros(3)}, "no weights of this model"),
        ({"scale": torch.tensor(1.0)}, "lacks the weight"),
        ({"a.scale": torch.tensor(1.0), "b.scale": torch.tensor(1.0)}, r"several networks \(a\., b\.\)"),
        ("nowhere.ckpt", "neither a checkpoint file nor a folder"),
        (3, "int is no checkpoint"),
    ],
)
def test_checkpoints_of_something_else(classifier, state, reason):
    with pytest.raises(ValueError, match=reason):
        state_of(classifier, state)


def test_checkpoint_of_another_size(classifier):
    state = classifier.state_dict() | {"head.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"head.bias.*\(4,\) in a checkpoint and \(3,\)"):
        state_of(classifier, state)


def test_module_as_its_own_checkpoint(classifier):
    assert read_checkpoint(classifier).keys() == classifier.state_dict().keys()


# -- projection --------------------------------------------------------------------------------------------------------


def test_projection_keeps_inner_products(classifier, digits):
    train, test = digits
    exact, norms = grad_dot(classify(classifier), train, test), [classify(classifier).norms(part) for part in digits]
    scale = norms[0][:, None] * norms[1]
    for dims in (256, 4096):
        found = grad_dot(classify(classifier, proj_dim=dims), train, test)
        # The error of an inner product has a deviation of at most |g| |h| sqrt(2 / dims).
        assert ((found - exact) / scale).abs().max() < 4 * (2 / dims) ** 0.5
    near(classify(classifier, proj_dim=4096).norms(train), norms[0], tolerance=0.1)


def test_projection_is_the_same_however_it_is_computed(classifier, digits, monkeypatch):
    whole = classify(classifier, proj_dim=5)
    table = whole.matrix(digits[0])
    assert table.shape == (9, 5)
    assert torch.equal(whole.matrix(digits[0]), table)  # now from memory
    near(classify(classifier, proj_dim=5, max_grad_elements=1).matrix(digits[0]), table)  # now drawn again and again
    near(classify(classifier, proj_dim=5, batch_size=2).matrix(digits[0]), table)
    assert (classify(classifier, proj_dim=5, proj_seed=1).matrix(digits[0]) - table).abs().min() > 0
    parts = [classify(classifier, proj_dim=5, params=name).matrix(digits[0]) for name in ("body", "scale", "head")]
    near(sum(parts), table)


def test_projection_has_unit_variance_in_sum():
    matrix = torch.cat(list(Projection({"a": 3000}, 20, 0, keep=0).pieces("a")))
    assert matrix.shape == (3000, 20)
    assert abs(float(matrix.var() * 20) - 1) < 0.03
    assert abs(float(matrix.mean())) < 0.005
    other = torch.cat(list(Projection({"b": 3000}, 20, 0, keep=0).pieces("b")))
    assert abs(float((matrix * other).mean() * 20)) < 0.03


def test_long_tensors_are_projected_in_pieces(monkeypatch):
    from lit_models.influence import gradients

    monkeypatch.setattr(gradients, "PROJECTION_PIECE", 160)
    for keep in (0, 10_000):
        projection = Projection({"a": 100, "b": 7}, 16, 0, keep)
        assert [len(piece) for piece in projection.pieces("a")] == [10] * 10
        block = {"a": torch.randn(3, 100), "b": torch.randn(3, 7)}
        whole = sum(value @ torch.cat(list(projection.pieces(name))) for name, value in block.items())
        near(projection(block), whole)


# -- cache -------------------------------------------------------------------------------------------------------------


def test_cached_gradients_are_read(classifier, digits, tmp_path, monkeypatch):
    train, test = digits
    options = {"cache_dir": str(tmp_path), "batch_size": 4}
    plain = classify(classifier)
    some = tuple(part[:5] for part in train)
    near(classify(classifier, **options).matrix(some), plain.matrix(some))
    expected = grad_dot(plain, train, test)
    computed, compute = [], PerSampleGradients.compute
    monkeypatch.setattr(PerSampleGradients, "compute", lambda *given: computed.append(given[3]) or compute(*given))
    near(grad_dot(classify(classifier, **options), train, test), expected)
    assert computed == [[0, 1, 2, 3], [5, 6, 7], [8]]  # all tests, and the train examples that are new
    small = classify(classifier, **options, max_grad_elements=1)
    assert small.plan(9, 4).gradients == 13
    near(grad_dot(small, train, test), expected)
    assert len(computed) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_cache_tells_weights_and_options_apart(classifier, digits, tmp_path):
    options, other = {"cache_dir": str(tmp_path)}, changed(classifier)
    for checkpoint in (None, other.state_dict()):
        for extra in ({}, {"params": "head"}, {"proj_dim": 7}, {"proj_dim": 7, "proj_seed": 1}):
            for _ in range(2):
                found = classify(classifier, **options, **extra).matrix(digits[0], checkpoint)
                near(found, classify(classifier, **extra).matrix(digits[0], checkpoint))
    assert len(list(tmp_path.iterdir())) == 8


def test_rows_in_the_cache(tmp_path):
    cache = RowCache(tmp_path / "new")
    assert cache.missing(["a", "b"]) == [0, 1]
    cache.write(["a", "b"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    RowCache(tmp_path / "new").write(["c"], torch.tensor([[5.0, 6.0]]))
    assert cache.missing(["c", "x", "a"]) == [1]
    assert cache.read(["c", "b", "c"]).tolist() == [[5.0, 6.0], [3.0, 4.0], [5.0, 6.0]]
    (tmp_path / "new/broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a file of this cache"):
        RowCache(tmp_path / "new").missing(["d"])


def test_digests_tell_contents_apart():
    values = [
        torch.tensor([1, 2]),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0, 2.0]).bfloat16(),
        torch.tensor(1),
        torch.empty(0),
        [1, 2],
        [[1], 2],
        [1, [2]],
        "1",
        1,
        True,
        None,
        {"a": 1, "b": 2},
        {"a": 2, "b": 1},
        {"a": {"b": 1}},
    ]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"b": 2, "a": 1}) == digest_of({"a": 1, "b": 2})
    assert digest_of(torch.arange(3).numpy()) == digest_of(torch.arange(3))
    with pytest.raises(TypeError, match="set can't be told from others"):
        digest_of({1})
    assert digest_of(torch.arange(6).reshape(2, 3).T) == digest_of(torch.arange(6).reshape(2, 3).T.contiguous())


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_over_checkpoints(classifier, digits):
    train, test = digits
    models = [classifier, changed(classifier)]
    train_rows, test_rows = ([classifier_gradients(model, part) for model in models] for part in digits)
    expected = 0.3 * train_rows[0] @ test_rows[0].T + 0.1 * train_rows[1] @ test_rows[1].T
    source, states = classify(classifier), [model.state_dict() for model in models]
    near(tracin_cp(source, states, [0.3, 0.1], train, test), expected)
    near(tracin_cp(source, iter(states), torch.tensor([0.3, 0.1]), train, test, aggregate=True), expected.sum(1))
    near(
        tracin_self(source, states, [0.3, 0.1], train),
        sum(lr * rows.square().sum(1) for lr, rows in zip([0.3, 0.1], train_rows, strict=True)),
    )
    units = [F.normalize(rows[1]) for rows in (train_rows, test_rows)]
    near(grad_cos(source, train, test, states[1]), units[0] @ units[1].T)
    for lrs in ([0.1], [0.1, 0.1, 0.1], []):
        with pytest.raises(ValueError, match=r"lrs: \d learning rates for 2 checkpoints"):
            tracin_cp(source, states, lrs, train, test)
    with pytest.raises(ValueError, match="for 0 checkpoints"):
        tracin_cp(source, [], [], train, test)


def test_one_checkpoint_at_a_time(classifier, digits):
    import gc
    import weakref

    alive = []

    def load(number):
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        state = {name: value.clone() + number for name, value in classifier.state_dict().items()}
        alive.extend(weakref.ref(value) for value in state.values())
        return state

    tracin_cp(classify(classifier), [lambda n=n: load(n) for n in range(3)], [1.0] * 3, *digits)
    assert len(alive) == 15


def test_a_step_lowers_the_loss_as_predicted(classifier, digits):
    train, test = digits
    model = copy.deepcopy(classifier).double().eval()
    train, test = ((pixels.double(), labels) for pixels, labels in digits)
    source = classify(model)
    before = source.losses(test)
    lr, ids = 1e-3, [0, 3, 3]
    influence = trajectory_influence(source, [copy.deepcopy(model)], [0], [ids], [lr], train, test)
    predicted = predict_trajectory(before, influence)
    F.cross_entropy(model(train[0][ids]), train[1][ids]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= lr * parameter.grad
    after = source.losses(test)
    assert (after - before).abs().min() > 1e-5
    assert ((after - predicted[1]) / (after - before)).abs().max() < 0.02


# -- trajectories ------------------------------------------------------------------------------------------------------


def test_checkpoint_before_the_step():
    assert checkpoint_of_step(5, [0, 2, 3]) == [0, 0, 1, 2, 2]
    assert checkpoint_of_step(3, range(3)) == [0, 1, 2]
    for saved_at in ([], [1, 2], [0, 2, 2]):
        with pytest.raises(ValueError, match="saved_at"):
            checkpoint_of_step(3, saved_at)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_trajectory(classifier, digits, reduction):
    train, test = digits
    states = [classifier.state_dict(), changed(classifier).state_dict()]
    source = classify(classifier)
    dots = [source.dots(train, test, state) for state in states]
    ids, lrs = [[0, 3, 3], [8], [1, 2]], [0.3, 0.2, 0.1]
    padded = torch.tensor([[0, 3, 3], [8, -1, -1], [1, -1, 2]])
    expected, total = [], torch.zeros(4, dtype=torch.float64)
    for step, lr, table in zip(ids, lrs, [dots[0], dots[0], dots[1]], strict=True):
        total = total + lr * table[step].sum(0) / (len(step) if reduction == "mean" else 1)
        expected.append(total)
    for given in (ids, padded):
        found = trajectory_influence(source, states, [0, 2], given, torch.tensor(lrs), train, test, reduction)
        near(found, torch.stack(expected))
    start = torch.arange(4.0)
    near(predict_trajectory(start, found, 0.5), torch.cat([start[None], start - 0.5 * torch.stack(expected)]))


def test_only_needed_gradients_are_computed(classifier, digits, monkeypatch):
    train, test = digits
    source = classify(classifier)
    computed, run = [], source._run
    monkeypatch.setattr(source, "_run", lambda *given: computed.append(given[-1]) or run(*given))
    state = classifier.state_dict()

    def unused():
        raise AssertionError("no step uses this checkpoint")

    trajectory_influence(source, [state, state, unused], [0, 2, 7], [[0, 1], [1, 2], [5], [5]], [1.0] * 4, train, test)
    assert sum(computed) == (4 + 3) + (4 + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ids": [[0], [9]]}, "9 is not a row of the 9 train examples"),
        ({"lrs": [0.1]}, "lrs and saved_at"),
        ({"saved_at": [0, 1]}, "lrs and saved_at"),
    ],
)
def test_wrong_runs(classifier, digits, change, reason):
    given = {"checkpoints": [None], "saved_at": [0], "ids": [[0], [1]], "lrs": [0.1, 0.1]} | change
    with pytest.raises(ValueError, match=reason):
        trajectory_influence(classify(classifier), train=digits[0], test=digits[1], **given)


def test_scale_of_a_trajectory():
    draws = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(4):
        influence, start = torch.randn(6, 3, generator=draws), torch.rand(3, generator=draws)
        losses = predict_trajectory(start, influence, 0.7)
        losses[2, 1] = losses[4, 0] = torch.nan
        runs.append((influence, losses))
    assert fit_scale(runs) == pytest.approx(0.7, rel=1e-5)
    assert trajectory_scale("raw") == 1.0
    assert trajectory_scale("val", validation=runs) == pytest.approx(0.7, rel=1e-5)
    assert trajectory_scale("oracle", tested=runs[:1]) == pytest.approx(0.7, rel=1e-5)
    with pytest.warns(UserWarning, match="at least 4"):
        trajectory_scale("val", validation=runs[:3])
    for scale in ("val", "oracle", "other"):
        with pytest.raises(ValueError, match="scale"):
            trajectory_scale(scale)


# -- cost --------------------------------------------------------------------------------------------------------------


def test_cost(classifier, digits):
    train, test = digits
    source = classify(classifier)
    size = source.size
    assert size == 6 * 8 + 8 + 1 + 8 * 3 + 3
    cost = estimate(source, 3, train, test)
    assert (cost.gradients, cost.numbers, cost.cache) == (3 * 13, size, 0)
    assert cost.memory == 4 * (4 + 9) * size
    assert cost.multiplications == 3 * 9 * 4 * size
    assert cost.seconds is None
    assert estimate(source, 3, train).gradients == 27
    assert estimate(source, 3, train, test, aggregate=True).memory == 4 * (1 + 9) * size
    cached = estimate(classify(classifier, cache_dir="x", proj_dim=10), 2, train, test)
    assert cached.cache == 2 * 13 * 10 * 4
    timed = estimate(source, 3, train, test, timed=True)
    assert timed.seconds > 0
    assert "39 gradients of 84 numbers" in str(timed)


@pytest.mark.parametrize("name", ["max_grad_elements", "batch_size", "proj_dim"])
def test_options_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}: 0 must be at least 1"):
        GradientOptions(**{name: 0})


def test_batches_of_examples():
    rows = [{"labels": [1, 2], "x": 1.5}, {"labels": [3], "x": 2.5}]
    batch = pad_and_stack(rows)
    assert batch["labels"].tolist() == [[1, 2], [3, -100]]
    assert batch["x"].tolist() == [1.5, 2.5]
    for bad in ([torch.zeros(2, 2), torch.zeros(3, 2)], ["a", "b"]):
        with pytest.raises(ValueError, match="can't be put into one batch"):
            pad_and_stack(bad)
    for bad, reason in (
        ((torch.zeros(2), torch.zeros(3)), r"lengths \[2, 3\]"),
        ([], "there are none"),
        ({"a": ["text"]}, "tensors only, got list"),
    ):
        with pytest.raises(ValueError, match=reason):
            Examples(bad)
    assert Examples([{"input_ids": [1] * n} for n in (3, 1, 2)]).order() == [1, 2, 0]
    assert Examples(torch.arange(4)).subset([2, 0])[0] == 2
