import pytest
import torch

from datamodules.collate import pad_left, pad_right


def test_right():
    ids, mask = pad_right([[5, 6, 7], [9], [3, 4]], 0)
    assert ids.tolist() == [[5, 6, 7], [9, 0, 0], [3, 4, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_left_to_a_given_length():
    ids, mask = pad_left([[5, 6], [9]], 8, length=4)
    assert ids.tolist() == [[8, 8, 5, 6], [8, 8, 8, 9]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]


def test_mask_follows_the_length_not_the_id():
    assert pad_right([[0, 0], [0]], 0)[1].tolist() == [[1, 1], [1, 0]]


def test_empty_row_and_no_rows():
    assert pad_left([[], [4]], 0)[1].tolist() == [[0], [1]]
    assert pad_right([], 0)[0].shape == (0, 0)


def test_row_that_does_not_fit():
    with pytest.raises(ValueError, match="3 tokens does not fit into the padded length 2"):
        pad_right([[1, 2, 3]], 0, length=2)
