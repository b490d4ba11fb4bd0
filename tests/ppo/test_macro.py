"""Macro actions: rules, equivalences, parsing on generated tokens, and what is refused."""

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from lit_models.ppo import GAE, KLPenalty, LitPPO, MacroGAE, PPOLoss, RowNoise, ScoreOptions, steps
from lit_models.ppo.macro import (
    Fixed,
    FunctionSegmenter,
    Lines,
    Parsing,
    Pattern,
    Perplexity,
    Punctuation,
    Randomized,
    Sentences,
    Sequence,
    Token,
    Tree,
    macro_texts,
)
from lit_models.ppo.macro import functional as macro
from lit_models.ppo.macro.offsets import decode, token_ends
from lit_models.ppo.macro.parsing import (
    ClauseParser,
    ConstituencyParser,
    clauses_of,
    constituent_starts,
    from_nltk,
    leaf_spans,
    sentences,
)
from lit_models.tokenization import load_tokenizer
from tests.reference.rlhf.macro_checks import rollout_of

LENGTHS = [10, 1, 2, 7]


@pytest.fixture
def rollout():
    """Ragged batch with random rewards and values; what lies in the padding is NaN."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(10) < torch.tensor(LENGTHS)[:, None]).float()

    def draw():
        return torch.randn(4, 10, generator=generator).masked_fill(mask == 0, torch.nan)

    rollout = rollout_of(mask, old_values=draw(), reward_mask=mask, ref_logprobs=draw())
    rollout.rewards = draw().nan_to_num(0.0)
    rollout.noise = RowNoise(seed=1, rollout=2, total=4)
    return rollout


def estimate(rollout, *args, **options):
    return MacroGAE(*args, **options).estimate(copy.copy(rollout))


# -- equivalences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gamma": 0.9, "lam": 0.5}, {"lam_critic": 1.0}, {"whiten_advantages": True}])
@pytest.mark.parametrize("kind", ["equal", "unit", "first", "position_decayed", "position_official"])
def test_tokens_as_macro_actions_are_token_level_ppo(rollout, options, kind):
    advantages, returns, _ = estimate(rollout, "token", value_aggregation=kind, **options)
    expected = GAE(**options).estimate(rollout)
    torch.testing.assert_close(advantages, expected[0].nan_to_num(0.0))
    torch.testing.assert_close(returns, expected[1].nan_to_num(0.0))


def test_long_macro_actions_are_the_sequence(rollout):
    for left, right in zip(estimate(rollout, "fixed", n=10)[:2], estimate(rollout, "sequence")[:2], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("rule", ["token", "fixed", "randomized", "ppl", "sequence"])
def test_without_discount_an_advantage_is_the_rest_of_the_rewards(rollout, rule):
    held = copy.copy(rollout)
    advantages, returns, _ = MacroGAE(rule, gamma=1.0, lam=1.0).estimate(held)
    ids = held.segment_ids
    rest = rollout.rewards.flip(1).cumsum(1).flip(1)
    starts = macro.segment_starts(ids)
    torch.testing.assert_close(returns[starts], rest[starts])
    values = macro.to_tokens(macro.segment_sum(held.segment_weights * rollout.old_values, ids), ids)
    torch.testing.assert_close(advantages[starts], (rest - values)[starts])


@pytest.mark.parametrize("rule", ["fixed", "randomized", "ppl"])
def test_rows_do_not_depend_on_their_batch(rollout, rule):
    held = copy.copy(rollout)
    advantages, returns, _ = MacroGAE(rule, lam=0.7).estimate(held)
    for row, length in enumerate(LENGTHS):
        alone = rollout.rows(torch.tensor([row]))
        for name in ("response_mask", "old_values", "reward_mask", "rewards", "ref_logprobs"):
            setattr(alone, name, getattr(alone, name)[:, :length])
        alone.response_ids = alone.response_ids[:, :length]
        ids = held.segment_ids[row : row + 1, :length]
        single = MacroGAE(FunctionSegmenter(lambda _, ids=ids: ids), lam=0.7).estimate(alone)
        torch.testing.assert_close(single[0][0], advantages[row, :length])
        torch.testing.assert_close(single[1][0], returns[row, :length])


def test_sum_keeps_the_kl_penalty_and_weighted_divides_it():
    mask = torch.ones(1, 11)  # two macro actions of five tokens, and the last token alone
    kl = torch.rand(1, 11)
    rewards = -0.1 * kl
    ids = macro.isolate_last(Fixed(5).segment(rollout_of(mask))[0])
    assert ids[0].tolist() == [0] * 5 + [1] * 5 + [2]
    summed = macro.segment_sum(rewards, ids).sum()
    torch.testing.assert_close(summed, -0.1 * kl.sum())
    weighted = macro.segment_sum(macro.aggregation_weights(ids, "equal") * rewards, ids).sum()
    torch.testing.assert_close(weighted, -0.1 / 5 * kl[0, :-1].sum() - 0.1 * kl[0, -1])


def test_discounts_inside_and_between_macro_actions(rollout):
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    rollout = rollout_of(torch.ones(1, 4), rewards=rewards, old_values=torch.zeros(1, 4), reward_mask=torch.ones(1, 4))
    _, returns, _ = estimate(rollout, "fixed", n=2, rho=0.5, gamma=0.5, lam=1.0)
    assert returns[0].tolist() == [2 + 0.5 * 8, 2 + 0.5 * 8, 8, 8]
    _, returns, _ = estimate(rollout, "fixed", n=2, gamma=0.5, lam=1.0, smdp_discount=True)
    assert returns[0].tolist() == [3 + 0.25 * 12, 3 + 0.25 * 12, 12, 12]


def test_a_score_behind_the_last_token_is_not_lost(rollout):
    mask = torch.tensor([[1.0, 1, 1, 0, 0]])
    held = rollout_of(mask, old_values=torch.zeros(1, 5))
    held.scores, held.ended = torch.tensor([2.0]), torch.tensor([True])
    steps.shape(held, [], ScoreOptions(position="after_last"))
    assert held.rewards[0].tolist() == [0, 0, 0, 2, 0]
    assert MacroGAE("sequence").estimate(held)[1][0].tolist() == [2, 2, 2, 0, 0]


# -- rules -------------------------------------------------------------------------------------------------------------


def test_schedule_of_n():
    rule = Fixed(n=9, n_end=1, schedule=4)
    assert [rule.present(rollout) for rollout in (0, 1, 2, 3, 4, 9)] == [9, 7, 5, 3, 1, 1]
    held = rollout_of(torch.ones(1, 6))
    held.noise = RowNoise(seed=0, rollout=3, total=1)
    assert rule.segment(held)[0].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_tokens_of_others_inside_a_response_belong_to_no_macro_action():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0]])
    assert Fixed(2).segment(rollout_of(mask))[0].tolist() == [[0, 0, -1, -1, 1, 1, 2, -1]]
    held = rollout_of(mask, ref_logprobs=torch.tensor([[-1.0, -0.5, -9, 0, -2, -2, -3, -9]]))
    assert Perplexity().segment(held)[0].tolist() == [[0, 0, -1, -1, 1, 1, 2, -1]]


def test_random_lengths_depend_on_the_row_alone():
    def ids(world, rank, rollout=0):
        held = rollout_of(torch.ones(4 // world, 30))
        held.noise = RowNoise(5, rollout, 4, rank=rank, world_size=world)
        return Randomized().segment(held)[0]

    whole = ids(1, 0)
    assert torch.equal(whole[0::2], ids(2, 0))
    assert torch.equal(whole[1::2], ids(2, 1))
    assert not torch.equal(whole, ids(1, 0, rollout=1))
    lengths = [macro.segment_sum(torch.ones(4, 30), whole)[row, :-1].tolist() for row in range(4)]
    assert lengths[0] != lengths[1]


def test_perplexity_of_the_prefix():
    nll = torch.tensor([[1.0, 3.0, 2.5, 1.0]])
    held = rollout_of(torch.ones(1, 4), ref_logprobs=-nll)
    assert Perplexity("token").segment(held)[0].tolist() == [[0, 1, 1, 1]]
    assert Perplexity("prefix").segment(held)[0].tolist() == [[0, 1, 2, 2]]


# -- text --------------------------------------------------------------------------------------------------------------

TEXT = "A dull, slow story. The cast is poor!\nNo; but the music “naïve” is 好 too loud."


@pytest.fixture(params=["bytes", "words"])
def tokenizer(request, tiny_tokenizer):
    """A byte-level and a SentencePiece-like tokenizer, which marks spaces."""
    if request.param == "bytes":
        return load_tokenizer(str(tiny_tokenizer))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<pad>", "<eos>", *sorted({f"▁{word}" for word in TEXT.split()}), *sorted(set(TEXT))]
    inner = Tokenizer(models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def generated(tokenizer, *texts):
    """Rollout of texts with an end token, padded on the right."""
    rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    width = max(map(len, rows))
    held = rollout_of((torch.arange(width) < torch.tensor([[len(row)] for row in rows])).float())
    held.response_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    held.responses = list(texts)
    return held


def pieces(tokenizer, held, segmenter):
    segmenter.prepare(tokenizer)
    held.segment_ids, metrics = segmenter.segment(held)
    macro.check_segments(held.segment_ids, held.response_mask, "test")
    held.advantages = torch.zeros_like(held.response_mask)
    return [text.replace(" [+0.00]", "§").split("§ | ") for text in macro_texts(held, tokenizer)], metrics


def test_ends_of_tokens_are_those_of_the_decoded_prefixes(tokenizer):
    ids = generated(tokenizer, TEXT).response_ids[0].tolist()
    (ends,) = token_ends(tokenizer, [ids])
    whole = [len(text) for text in decode(tokenizer, [ids[: number + 1] for number in range(len(ids))])]
    assert ends == whole
    assert ends[-1] == len(decode(tokenizer, [ids])[0])


def test_sentences_lines_and_clauses(tokenizer):
    held = generated(tokenizer, TEXT)
    found, _ = pieces(tokenizer, held, Sentences())
    assert [piece.strip() for piece in found[0]][:2] == ["A dull, slow story.", "The cast is poor!"]
    found, _ = pieces(tokenizer, held, Punctuation(min_words=1))
    assert [piece.strip() for piece in found[0]][:3] == ["A dull,", "slow story.", "The cast is poor!"]
    found, _ = pieces(tokenizer, held, Pattern(" [Tt]he "))
    assert [piece.strip()[:6] for piece in found[0]] == ["A dull", "The ca", "the mu"]


def test_lines_keep_their_break(tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    found, _ = pieces(tokenizer, generated(tokenizer, "a = 1\nb = 2\nc"), Lines())
    assert found[0][:2] == ["a = 1\n", "b = 2\n"]


class Bracketed(ConstituencyParser):
    """Parser that knows its sentences."""

    TREES: ClassVar = {
        "The small cat sat on the mat.": "(S (NP (DT The) (JJ small) (NN cat)) (VP (VBD sat) (PP (IN on) "
        "(NP (DT the) (NN mat)))) (. .))",
        " Yes.": "(INTJ (UH Yes) (. .))",
        "wrong words": "(NP (NN other) (NN words))",
    }

    def parse(self, sentences):
        return [Tree.from_brackets(self.TREES[text]) if text in self.TREES else None for text in sentences]


def test_parsing_cuts_generated_tokens_at_constituents(tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    texts = ["The small cat sat on the mat. Yes.", "wrong words", "never seen"]
    held = generated(tokenizer, *texts)
    found, metrics = pieces(tokenizer, held, Parsing(cutoff=100, parser=Bracketed()))
    assert found[0][:2] == ["The small cat sat on the mat.", " Yes."]
    assert metrics["macro/parse_fallback_frac"].tolist() == [0.0, 1.0, 1.0]
    lengths = macro.segment_sum(held.response_mask, held.segment_ids)[1]
    assert lengths[0] == 5  # n-grams where there is no tree
    ids = held.response_ids[0].tolist()
    (ends,) = token_ends(tokenizer, [ids])
    cat = sum(end <= len("The small cat") for end in ends)
    found, _ = pieces(tokenizer, held, Parsing(cutoff=cat + 1, parser=Bracketed()))
    assert found[0][0] == "The small cat"


def test_parsing_without_a_model_works_on_any_text(tokenizer):
    held = generated(tokenizer, TEXT, "", "...", "one", "\n\n")
    _, metrics = pieces(tokenizer, held, Parsing())
    assert metrics["macro/parse_fallback_frac"].sum() == 0


def test_newlines_do_not_shift_what_follows(tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    texts = ["One two three.\n\n\nFour five six.", "One two three. Four five six."]
    found, _ = pieces(tokenizer, generated(tokenizer, *texts), Parsing(cutoff=1000))
    assert [piece.strip() for piece in found[0]][:2] == [piece.strip() for piece in found[1]][:2]


def test_sentences_keep_their_spaces_in_front():
    text = "One.  Two!\nThree? four"
    assert [text[a:b] for a, b in sentences(text)] == ["One.", "  Two!", "Three?", " four"]


def test_words_of_a_tree_must_be_those_of_the_sentence():
    assert leaf_spans(" a  b.", ["a", "b", "."]) == [(0, 2), (2, 5), (5, 6)]
    for leaves in (["a", "c"], ["b"], ["a"]):
        with pytest.raises(ValueError, match="parser's word"):
            leaf_spans("a b", leaves)


@pytest.mark.parametrize("text", ["(S (NP x)", "(S x))", "", "(A a) (B b)"])
def test_unbalanced_brackets(text):
    with pytest.raises(ValueError, match="unbalanced"):
        Tree.from_brackets(text)


def test_nltk_trees():
    nltk = pytest.importorskip("nltk")
    brackets = "(S (NP (DT The) (NN cat)) (VP (VBD sat)))"
    assert from_nltk(nltk.Tree.fromstring(brackets)) == Tree.from_brackets(brackets)


def test_constituents_of_one_word_join_what_is_before():
    tree = Tree.from_brackets("(S (NP (DT The) (NN cat)) (VP (VBD sat)) (. .))")
    assert constituent_starts(tree, [1, 2, 1, 1], 4) == [0, 5]
    assert constituent_starts(tree, [1, 2, 1, 1], 100) == [0, 5]
    with pytest.raises(ValueError, match="3 token counts for 4 words"):
        constituent_starts(tree, [1, 2, 1], 4)


def test_clauses():
    text = "I came, I saw and I won (twice)."
    assert [text[a:b] for a, b in clauses_of(text)] == ["I came,", " I saw", " and I won (twice)."]
    (tree,) = ClauseParser().parse([text])
    assert tree.leaves == text.split()


# -- losses ------------------------------------------------------------------------------------------------------------


def test_macro_ratios_at_one_have_the_gradient_of_token_ratios(rollout):
    held = copy.copy(rollout)
    held.advantages, held.returns, _ = MacroGAE("fixed", n=3).estimate(held)
    held.old_logprobs = torch.randn(4, 10)
    held.old_values = held.old_values.nan_to_num(0.0)
    gradients = {}
    for ratio in ("token", "macro", "macro_geo"):
        logprobs = held.old_logprobs.clone().requires_grad_()
        live = (logprobs, torch.zeros(4, 10), held.old_values)
        loss = steps.losses(held, None, None, PPOLoss(ratio=ratio), live=live).policy
        loss.backward()
        gradients[ratio] = logprobs.grad
    tokens, actions = held.response_mask.sum(), macro.count_segments(held.segment_ids).sum()
    torch.testing.assert_close(gradients["macro"] * actions, gradients["token"] * tokens)
    lengths = macro.to_tokens(macro.segment_sum(held.response_mask, held.segment_ids), held.segment_ids)
    torch.testing.assert_close(gradients["macro_geo"] * lengths * actions, gradients["token"] * tokens)


def test_extreme_ratios_of_long_macro_actions_stay_finite():
    ids = torch.zeros(1, 400, dtype=torch.int64)
    logprobs = torch.full((1, 400), -0.1, requires_grad=True)
    ratio = macro.macro_log_ratio(logprobs, torch.full((1, 400), -5.0), ids).exp()
    ratio.sum().backward()
    assert torch.isfinite(ratio).all()
    assert torch.isfinite(logprobs.grad).all()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "ngram"}, r"advantage\.rule: 'ngram' is none of token, fixed"),
        ({"n": 0}, r"advantage\.n must be at least 1, got 0"),
        ({"rule": "ppl", "n": 3}, r"advantage\.n belongs to advantage\.rule: fixed"),
        ({"lam": 1.5}, r"advantage\.lam must lie in \[0, 1\]"),
        ({"rho": -1.0}, r"advantage\.rho must lie in \[0, 1\]"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        MacroGAE(**options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Fixed(0), r"advantage\.rule\.n must be at least 1"),
        (lambda: Fixed(5, n_end=0, schedule=3), r"advantage\.rule\.n_end must be at least 1"),
        (lambda: Fixed(5, n_end=1), r"advantage\.rule\.schedule must be"),
        (lambda: Randomized([]), r"advantage\.rule\.lengths"),
        (lambda: Parsing(cutoff=0), r"advantage\.rule\.cutoff"),
        (lambda: Pattern("("), r"advantage\.rule\.pattern: '\(' is no regular expression"),
        (lambda: FunctionSegmenter("no.such"), r"advantage\.rule\.function: there is no function 'no\.such'"),
    ],
)
def test_rules_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 2, 2, -1]],  # a gap
        [[1, 1, 1, -1]],  # does not begin with 0
        [[0, 1, 0, -1]],  # comes back
        [[0, 0, 0, 0]],  # covers padding
        [[0, 0, -1, -1]],  # leaves out a token
        [[0.0, 0.0, 0.0, -1.0]],
        [[0, 0, 0]],
    ],
)
def test_what_a_segmenter_returns_is_checked(ids):
    mask = torch.tensor([[1.0, 1, 1, 0]])
    held = rollout_of(mask, rewards=mask, old_values=mask, reward_mask=mask)
    with pytest.raises(ValueError, match=r"advantage\.rule: FunctionSegmenter must"):
        MacroGAE(FunctionSegmenter(lambda _: torch.tensor(ids))).estimate(held)


def test_macro_losses_need_macro_actions(rollout):
    source = SimpleNamespace(reproducible=True)
    with pytest.raises(ValueError, match=r"model\.loss\.ratio .* lit_models\.ppo\.MacroGAE"):
        LitPPO(source, "t", [KLPenalty()], loss=PPOLoss(ratio="macro"))
    rollout.advantages = rollout.returns = rollout.old_logprobs = torch.zeros(4, 10)
    with pytest.raises(ValueError, match=r"loss\.value_loss: macro needs macro actions"):
        steps.losses(rollout, None, None, PPOLoss(value_loss="macro"), live=(rollout.returns,) * 3)


def test_official_settings_reach_the_module():
    source = SimpleNamespace(reproducible=True)
    model = LitPPO(source, "t", [KLPenalty()], advantage=MacroGAE(compat="official"))
    assert (model.loss.norm, model.scores.position, model.temperature) == ("sequence", "last_token", 1.0)
    assert model.advantage.isolate_last
    assert model.advantage.reward_aggregation == "weighted"


def test_all_rules_by_name_are_those_of_their_classes():
    classes = {"token": Token, "sequence": Sequence, "fixed": Fixed, "ppl": Perplexity, "sentence": Sentences}
    for name, kind in classes.items():
        assert type(MacroGAE(name).segmenter) is kind
