"""Curiosity and diversity against the reference vectors: one function per file, which raises AssertionError."""

import torch
from torch import Tensor

from lit_models.metrics import bleu, diversity, sentences
from lit_models.ppo import functional as ppo
from lit_models.ppo.curiosity import ICM
from lit_models.ppo.curiosity.functional import intrinsic_reward
from lit_models.ppo.curiosity.modeling import icm_loss, prediction_error
from lit_models.ppo.gate import Gate

from .checks import assert_near


def grad_norms(module: torch.nn.Module) -> dict[str, float]:
    return {name: float(parameter.grad.norm()) for name, parameter in module.named_parameters()}


def check_icm(data: dict, weights: dict[str, Tensor]) -> None:
    for case in data["cases"]:
        icm = ICM(case["hidden_dim"], case["intermediate_dim"])
        prefix = f"case{case['case']}."
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        icm.load_state_dict({**state, "error_moments": icm.error_moments})
        first, width = case["prompt_len"] - 1, case["resp_len"]
        hidden = torch.tensor(case["hidden_states"])[:, first : first + width + 1]
        actions = torch.tensor(case["action_embeddings"])
        mask = torch.tensor(case["action_mask"])[:, first:].float()
        assert mask.sum(1).tolist() == case["valid_lens"]
        gate = torch.tensor(case["gate"])
        prediction = icm(hidden, actions)
        assert_near(prediction.target.detach(), case["next_state"])
        assert_near(prediction.predicted.detach(), case["next_state_hat"])
        loss = ppo.masked_mean(icm_loss(prediction, actions), mask)
        loss.backward()
        assert_near(loss.detach(), case["icm_loss"])
        norms = grad_norms(icm)
        assert norms.keys() == case["icm_grad_norms"].keys()
        for name, value in case["icm_grad_norms"].items():
            assert_near(norms[name], value, 1e-4)
        errors = prediction_error(prediction).detach()
        assert_near(errors * mask, case["raw_intrinsic"])
        assert_near(intrinsic_reward(errors, mask, None, all_columns=True), case["official_whitened"])
        official = intrinsic_reward(errors, mask, gate, all_columns=True)
        assert_near(official, case["official_gated"])
        clean = intrinsic_reward(errors, mask, gate)
        assert_near(clean, case["clean_gated"])

        kl = ppo.kl_estimate(torch.tensor(case["logprobs"]), torch.tensor(case["ref_logprobs"]))
        scores = torch.tensor(case["scores"])
        rewards = -case["kl_ctl"] * kl[:, first:] * mask + ppo.place_scores(scores, mask, case["clip"])
        assert_near(rewards + case["eta"] * clean, case["clean_rewards_response_only"])
        extended = ppo.extend_mask(mask)
        rewards = -case["kl_ctl"] * kl
        rewards[:, first:] += ppo.place_scores(scores, extended, case["clip"]) + case["eta"] * official * extended
        assert_near(rewards, case["official_rewards"])


def check_gate(data: dict) -> None:
    for case in data["cases"]:
        gate = Gate("topk", case["topk"])
        tokens = torch.tensor(case["sequences"])[:, case["prompt_len"] :]
        steps = [gate(torch.tensor(scores), tokens[:, step]) for step, scores in enumerate(case["scores_step_major"])]
        assert torch.stack(steps, 1).long().tolist() == case["gate"]
        assert len(case["gate"]) == case["kept_rows"]
        assert not (tokens == case["pad_id"]).all(1).any()


def check_diversity(data: dict) -> None:
    for case in data["cases"]:
        texts = case["texts"]
        words = " ".join(texts).split()
        for order, counts in case["ngram_counts"].items():
            n = int(order)
            grams = [tuple(words[start : start + n]) for start in range(max(0, len(words) - n))]
            assert [len(set(grams)), len(grams)] == [counts["unique"], counts["total"]]
            share = round(100 * (1 - counts["unique"] / counts["total"]), 2) / 100 if counts["total"] else 0.0
            assert diversity.repetition(texts, n) == share
        assert_near(diversity.diversity(texts), case["diversity"])
        assert_near(diversity.ead(texts, data["vocab_size"]), case["ead"])
        split = [diversity.distinct_words(text) for text in texts]
        orders = [diversity.ead_of_order(split, n, data["vocab_size"]) for n in diversity.ORDERS]
        assert_near(orders, case["ead_per_n"])
        scores = bleu.self_bleu_scores([text.split() for text in texts])
        assert list(case["selfbleu_scores"]) == ["4"]
        assert_near(scores, case["selfbleu_scores"]["4"])
        assert_near(bleu.self_bleu(texts), case["selfbleu"])
        similarities = sentences.mean_similarities(torch.tensor(case["embeddings"]))
        assert_near(similarities, case["sentbert_per_text"])
        assert_near(similarities.mean(), case["sentbert"])


def check_selfbleu_monitor(data: dict) -> None:
    def unpadded(rows: list[list[int]]) -> list[list[int]]:
        return [[token for token in row if token != data["pad_id"]] for row in rows]

    assert data["weights"] == [1 / len(bleu.ORDERS)] * len(bleu.ORDERS)
    references = unpadded(data["references"])
    found = [bleu.bleu_against(row, references) for row in unpadded(data["hypotheses"])]
    assert_near(found, data["scores"])
