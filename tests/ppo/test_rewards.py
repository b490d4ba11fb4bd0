import http.server
import json
import threading

import pytest
import torch
from transformers import AutoTokenizer

from lit_models.backbones import FromConfig, FromPretrained
from lit_models.ppo import FunctionReward, HTTPReward, Reward, RewardModel, Rollout
from lit_models.ppo.rewards import target_length, total_scores


def rollout(rows=3, width=4):
    lengths = torch.tensor([width, 2, 1])[:rows]
    mask = (torch.arange(width) < lengths[:, None]).float()
    return Rollout(
        prompt_ids=torch.full((rows, 2), 5),
        prompt_mask=torch.ones(rows, 2, dtype=torch.long),
        response_ids=torch.arange(3, 3 + rows * width).view(rows, width),
        response_mask=mask,
        prompts=[f"question {row} " for row in range(rows)],
        responses=[f"answer {row}" for row in range(rows)],
        ended=torch.ones(rows, dtype=torch.bool),
        columns={"gold": list(range(rows))},
    )


def gold(rollout, factor=1.0):
    return [factor * value for value in rollout.columns["gold"]]


def per_token(rollout):
    return torch.ones_like(rollout.response_mask)


def wrong_shape(rollout):
    return torch.zeros(len(rollout), 1)


def nan_for_second(rollout):
    return [0.0, float("nan"), 0.0]


def total(*functions, weights=None):
    rewards = [
        FunctionReward(function, weight)
        for function, weight in zip(functions, weights or [1.0] * len(functions), strict=True)
    ]
    for reward in rewards:
        reward.build(None)
    return total_scores(rollout(), rewards, [None] * len(rewards))


def test_weighted_sum_of_scores_and_token_rewards():
    scores, tokens, parts = total(gold, per_token, weights=[2.0, 0.5])
    assert scores.tolist() == [0.0, 2.0, 4.0]
    assert torch.equal(tokens, 0.5 * rollout().response_mask)
    assert [value.tolist() for value in parts.values()] == [[0.0, 1.0, 2.0], [4.0, 2.0, 1.0]]


def test_function_by_import_path_with_arguments():
    reward = FunctionReward("tests.ppo.test_rewards.gold", arguments={"factor": 3.0})
    reward.build(None)
    assert reward.score(rollout(), None).tolist() == [0.0, 3.0, 6.0]


@pytest.mark.parametrize("path", ["no_such_module.reward", "tests.ppo.test_rewards.no_such_function", "plain"])
def test_unknown_function_is_named(path):
    with pytest.raises(ValueError, match=rf"rewards.function.*{path}"):
        FunctionReward(path).build(None)


def test_wrong_shape_says_which_shapes_are_right():
    with pytest.raises(ValueError, match=r"wrong_shape returned shape \(3, 1\); it must return \(3,\).*\(3, 4\)"):
        total(wrong_shape)


def test_nan_names_the_text():
    with pytest.raises(FloatingPointError, match="nan_for_second scored NaN for the text 'question 1 answer 1'"):
        total(nan_for_second)


def test_target_length():
    assert target_length(rollout(), 2).tolist() == [-1.0, 0.0, -0.5]


def test_reward_model_reads_the_last_token_and_normalizes(tiny_reward, tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    plain = RewardModel(FromPretrained(tiny_reward))
    network = plain.build(tokenizer).eval()
    data = rollout()
    scores = plain.score(data, network)
    for row in range(3):
        length = int(data.lengths[row])
        ids = data.input_ids[row : row + 1, : 2 + length]
        expected = network.model(ids, attention_mask=torch.ones_like(ids)).logits.squeeze()
        torch.testing.assert_close(scores[row], expected, atol=1e-5, rtol=1e-5)
    normalized = RewardModel(FromPretrained(tiny_reward), normalize=True, mean=1.0, std=2.0)
    normalized.build(tokenizer)
    torch.testing.assert_close(normalized.score(data, network), (scores - 1) / 2)
    pieces = RewardModel(FromPretrained(tiny_reward), batch_size=2)
    pieces.build(tokenizer)
    torch.testing.assert_close(pieces.score(data, network), scores)


def test_reward_model_with_another_tokenizer_reads_the_texts(tiny_reward, tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    reward = RewardModel(FromPretrained(tiny_reward), tokenizer=str(tiny_tokenizer))
    network = reward.build(tokenizer).eval()
    ids = torch.tensor([tokenizer("question 1 answer 1<eos>")["input_ids"]])
    expected = network.model(ids, attention_mask=torch.ones_like(ids)).logits.squeeze()
    torch.testing.assert_close(reward.score(rollout(), network)[1], expected, atol=1e-5, rtol=1e-5)


def test_normalization_without_statistics_says_what_to_do(tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    config = FromConfig(
        "llama",
        {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 300},
    )
    with pytest.raises(ValueError, match=r"rewards\.normalize.*reward_mean"):
        RewardModel(config, normalize=True).build(tokenizer)


def test_scores_from_a_service():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"scores": [len(text) for text in request["responses"]]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            return

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    scores = HTTPReward(f"http://127.0.0.1:{server.server_port}/").score(rollout(), None)
    thread.join()
    server.server_close()
    assert scores.tolist() == [8.0, 8.0, 8.0]


def test_custom_rewards_subclass_one_method():
    class Constant(Reward):
        def score(self, rollout, network):
            return torch.full((len(rollout),), 7.0)

    scores, tokens, parts = total_scores(rollout(), [Constant()], [None])
    assert scores.tolist() == [7.0] * 3
    assert tokens is None
    assert list(parts) == ["Constant"]
