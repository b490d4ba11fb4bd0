from functools import partial

import pytest

from .loading import load, load_tensors


@pytest.fixture
def rlhf():
    """Loader of the vectors in the folder `rlhf`: call it with the name of a file."""
    return partial(load, "rlhf")


@pytest.fixture
def pixel():
    """Loader of the vectors in the folder `pixel`: call it with the name of a JSON file."""
    return partial(load, "pixel")


@pytest.fixture
def pixel_tensors():
    """Loader of the tensors in the folder `pixel`: call it with the name of a file."""
    return partial(load_tensors, "pixel")
