from functools import partial

import pytest

from .loading import load


@pytest.fixture
def rlhf():
    """Loader of the vectors in the folder `rlhf`: call it with the name of a file."""
    return partial(load, "rlhf")
