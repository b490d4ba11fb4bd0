"""Repairs the environment before transformers or diffusers models are imported.

transformers imports torchaudio whenever it is installed, and torchaudio's binary extension links CUDA: on a machine
whose torch was built without it (or with another CUDA), every model import would fail. The Python part of torchaudio
works without the extension, so on that failure it is imported again with the extension marked as absent.
"""

import importlib
import sys
import types
from typing import Any

TORCHAUDIO_ERROR: Exception | None = None
"""Why torchaudio's extension could not be loaded, or None."""


def _extension_stub(error: Exception) -> types.ModuleType:
    """Stand-in for `torchaudio._extension` that says the binary part is missing."""
    stub = types.ModuleType("torchaudio._extension")

    def fail_if_no_align(function: Any) -> Any:  # noqa: ANN401
        def unavailable(*args: object, **kwargs: object) -> None:
            raise RuntimeError(f"torchaudio.{function.__name__} needs torchaudio's extension: {error}")

        return unavailable

    stub.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _IS_RIR_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        _load_lib=lambda _: False,
        fail_if_no_align=fail_if_no_align,
    )
    return stub


def import_torchaudio() -> types.ModuleType:
    """Import torchaudio, without its binary extension where that does not load.

    Returns:
        The `torchaudio` module. Transforms, filters, resampling and feature extraction work; `forced_align`,
        `rnnt_loss` and the CUDA CTC decoder raise RuntimeError when the extension is missing.
    """
    global TORCHAUDIO_ERROR
    try:
        return importlib.import_module("torchaudio")
    except (OSError, RuntimeError) as error:
        TORCHAUDIO_ERROR = error
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        del sys.modules[name]
    sys.modules["torchaudio._extension"] = _extension_stub(TORCHAUDIO_ERROR)
    return importlib.import_module("torchaudio")


if "torchaudio" not in sys.modules:
    import_torchaudio()
