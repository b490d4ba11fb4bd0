"""TracIn-CP: seconds for the scores of all pairs, ours against a backward pass per example and against other libraries.

All of them get the same checkpoints of the same tiny GPT-2 (vocabulary 1000, width 64, 2 layers, 4 heads) and the same
texts of 32 tokens with answers of 8, on the CPU in float32 over all parameters, without projection. Before anything is
timed the scores are compared. `dattri` and `captum` are left out where they are not installed; they may lie in a folder
of their own on PYTHONPATH.
"""

import argparse
import importlib.util
import io
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_models.influence.gradients import GradientOptions, PerSampleGradients
from lit_models.influence.tracin import estimate, tracin_cp

LENGTH, ANSWER = 32, 8
LEARNING_RATES = (3e-4, 2e-4, 1e-4)


class Network(nn.Module):
    """Logits of a GPT-2."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        from lit_models import FromConfig

        sizes = {"vocab_size": vocabulary, "n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        self.gpt = FromConfig("gpt2", sizes | dropout | ids).load().eval()
        self.gpt.config.pad_token_id = None  # else GPT-2 looks for padding, which vmap can't; only ours prevents that

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B,T,V) logits."""
        return self.gpt(input_ids=input_ids, use_cache=False).logits


class AnswerLoss(nn.Module):
    """Mean cross entropy of each text over its answer."""

    reduction = "none"

    def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(B,) in nats."""
        nll = F.cross_entropy(logits[:, -ANSWER - 1 : -1].mT, ids[:, -ANSWER:], reduction="none")
        return nll.mean(1)


Task = tuple[Network, list[dict[str, Tensor]], Tensor, Tensor]


def ours(task: Task, batch_size: int) -> Callable[[], Tensor]:
    """This collection."""
    net, states, train, test = task

    def batch(ids: Tensor) -> dict[str, Tensor]:
        labels = ids.clone()
        labels[:, :-ANSWER] = -100
        return {"input_ids": ids, "labels": labels}

    source = PerSampleGradients(net, options=GradientOptions(batch_size=batch_size))
    print(f"ours: {estimate(source, len(states), batch(train), batch(test))}")
    return lambda: tracin_cp(source, states, LEARNING_RATES, batch(train), batch(test))


def loop(task: Task, batch_size: int) -> Callable[[], Tensor]:
    """One backward pass per example; the gradients of the tests are kept."""
    net, states, train, test = task
    loss = AnswerLoss()

    def gradient(ids: Tensor) -> Tensor:
        value = loss(net(ids[None]), ids[None]).squeeze()
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(net.parameters()))])

    def score() -> Tensor:
        total = torch.zeros(len(train), len(test))
        for state, lr in zip(states, LEARNING_RATES, strict=True):
            net.load_state_dict(state)
            kept = torch.stack([gradient(ids) for ids in test])
            for row, ids in enumerate(train):
                total[row] += lr * (kept @ gradient(ids))
        return total

    return score


def dattri(task: Task, batch_size: int) -> Callable[[], Tensor]:
    """TRAIS-Lab/dattri, with its default projection turned off."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.data import DataLoader, TensorDataset

    net, states, train, test = task
    loss = AnswerLoss()

    def loss_of(parameters: Any, data: tuple[Tensor]) -> Tensor:
        ids = data[0][None]
        return loss(torch.func.functional_call(net, parameters, (ids,)), ids).squeeze()

    described = AttributionTask(loss_func=loss_of, model=net, checkpoints=states)
    attributor = TracInAttributor(described, weight_list=torch.tensor(LEARNING_RATES), normalized_grad=False)
    attributor.projector_kwargs = None
    loaders = [DataLoader(TensorDataset(ids), batch_size=batch_size) for ids in (train, test)]

    def score() -> Tensor:
        # Other kernels of attention run in a loop under vmap; its bars would hide the results.
        with sdpa_kernel(SDPBackend.MATH), redirect_stderr(io.StringIO()):
            return attributor.attribute(*loaders)

    return score


def captum(task: Task, batch_size: int) -> Callable[[], Tensor]:
    """Captum's TracInCP."""
    from captum.influence import TracInCP
    from torch.utils.data import TensorDataset

    net, states, train, test = task

    def load(model: nn.Module, number: int) -> float:
        model.load_state_dict(states[number])
        return LEARNING_RATES[number]

    scorer = TracInCP(
        net,
        TensorDataset(train, train),
        list(range(len(states))),
        checkpoints_load_func=load,
        loss_fn=AnswerLoss(),
        batch_size=batch_size,
    )
    return lambda: scorer.influence((test, test)).T


SIDES = {"ours": ours, "loop": loop, "dattri": dattri, "captum": captum}


def main() -> None:
    """Check that the sides agree, time them in turns, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=128)
    parser.add_argument("--test", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="dattri|captum")
    net = Network(options.vocabulary, options.width)
    states = []
    for _ in LEARNING_RATES:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    train, test = (torch.randint(3, options.vocabulary, (count, LENGTH)) for count in (options.train, options.test))
    sides: dict[str, Callable[[], Tensor]] = {}
    expected = torch.zeros(())
    for name, make in SIDES.items():
        if name in ("dattri", "captum") and importlib.util.find_spec(name) is None:
            print(f"{name} is not installed and left out")
            continue
        try:
            sides[name] = make((net, states, train, test), options.batch_size)
            table = sides[name]()
        except Exception as error:  # another version of another library must not end the benchmark
            if name == "ours":
                raise
            print(f"{name} does not run here and is left out: {type(error).__name__}: {error}")
            sides.pop(name, None)
            continue
        if name == "ours":
            expected = table
        print(f"{name}: largest difference to ours {(table - expected).abs().max() / expected.abs().max():.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repetitions):
        for name, score in sides.items():
            start = time.process_time()
            score()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        runs = " ".join(f"{value:.2f}" for value in seconds[name])
        print(f"{name:7} {median:7.2f} s of CPU time, {median / medians['ours']:6.2f} x ours; runs: {runs}", flush=True)


if __name__ == "__main__":
    main()
