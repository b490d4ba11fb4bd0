import numpy as np
import pytest

from datamodules.splits import stage_indices, stage_split


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 999])
@pytest.mark.parametrize("fractions", [[0.2, 0.4, 0.4], [1.0], [0.0, 0.5, 0.5], [2, 4, 4]])
def test_every_row_is_in_one_piece(n, fractions):
    pieces = stage_split(n, fractions)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(n))


def test_overshoot_moves_all_ends():
    assert [len(piece) for piece in stage_split(3, [0.5, 0.5])] == [1, 2]


def test_unknown_stage():
    with pytest.raises(ValueError, match=r"data\.stage: 3 is not one of the stages 0 to 2"):
        stage_indices(10, 3, [0.2, 0.4, 0.4])


def test_impossible_fractions():
    with pytest.raises(ValueError, match=r"data\.stage_fractions"):
        stage_split(10, [-1, 2])
