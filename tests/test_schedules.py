import math

import pytest
import torch

from lit_models.nn import WarmupConstant, WarmupCosine, WarmupLinear


def rates(schedule, steps, **options):
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "name": name, "lr": lr}
        for name, lr in (("actor", 1.0), ("critic_no_decay", 2.0))
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = schedule(optimizer, **options)
    seen = [[], []]
    for _ in range(steps + 1):
        for rows, group in zip(seen, optimizer.param_groups, strict=True):
            rows.append(group["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_linear_warms_up_and_falls_to_zero():
    first, second = rates(WarmupLinear, 6, warmup=2, total=6)
    assert first == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])
    assert second == pytest.approx([2 * rate for rate in first])


def test_cosine_falls_to_its_floor():
    first, _ = rates(WarmupCosine, 4, warmup=0, total=4, floor=0.2)
    assert first == pytest.approx([0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)])


def test_constant_needs_no_total():
    assert rates(WarmupConstant, 4, warmup=2)[0] == pytest.approx([0, 0.5, 1, 1, 1])


def test_a_share_of_the_total_and_one_warmup_per_group():
    assert rates(WarmupLinear, 3, warmup=0.5, total=4)[0] == pytest.approx([0, 0.5, 1, 0.5])
    first, second = rates(WarmupConstant, 3, warmup={"actor": 0, "critic": 2})
    assert first == pytest.approx([1, 1, 1, 1])
    assert second == pytest.approx([0, 1, 2, 2])


def test_linear_decay_to_a_floor():
    assert rates(WarmupLinear, 6, warmup=2, total=6, floor=0.2)[0] == pytest.approx([0, 0.5, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("warmup", [-1, 1.5, -0.1])
def test_warmup_out_of_range(warmup):
    with pytest.raises(ValueError, match=r"lr_scheduler\.warmup takes steps"):
        rates(WarmupLinear, 1, warmup=warmup, total=4)


def test_total_out_of_range_or_unknown():
    with pytest.raises(ValueError, match=r"lr_scheduler\.total must be at least 1"):
        rates(WarmupLinear, 1, total=0)
    with pytest.raises(ValueError, match=r"lr_scheduler\.total is not set"):
        rates(WarmupCosine, 2)
