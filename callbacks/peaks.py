"""What a device can compute at most, against which its use is measured."""

from typing import Literal

Kind = Literal["float32", "tf32", "bfloat16", "float16", "float64"]

KINDS: tuple[Kind, ...] = ("float32", "tf32", "bfloat16", "float16")

# Dense matrix products in 10^12 operations per second with sums in float32, from the vendors' data sheets, which often
# name twice as many for sparse matrices. Columns as in KINDS, 0 where the device has no such units.
# A name counts if all of its words occur in the device's; the first one does, so the more special names go first.
_PEAKS: tuple[tuple[str, tuple[float, float, float, float]], ...] = (
    ("gb200", (80.0, 1250.0, 2500.0, 2500.0)),
    ("b200", (75.0, 1125.0, 2250.0, 2250.0)),
    ("gh200", (67.0, 494.7, 989.4, 989.4)),
    ("h200 nvl", (60.0, 417.5, 835.5, 835.5)),
    ("h200", (67.0, 494.7, 989.4, 989.4)),
    ("h100 nvl", (60.0, 417.5, 835.5, 835.5)),
    ("h100 pcie", (51.2, 378.0, 756.0, 756.0)),
    ("h100", (67.0, 494.7, 989.4, 989.4)),
    ("h800 pcie", (51.2, 378.0, 756.0, 756.0)),
    ("h800", (67.0, 494.7, 989.4, 989.4)),
    ("h20", (44.0, 74.0, 148.0, 148.0)),
    ("a100", (19.5, 156.0, 312.0, 312.0)),
    ("a800", (19.5, 156.0, 312.0, 312.0)),
    ("a30", (10.3, 82.0, 165.0, 165.0)),
    ("a40", (37.4, 74.8, 149.7, 149.7)),
    ("a10g", (31.5, 35.0, 70.0, 70.0)),
    ("a10", (31.2, 62.5, 125.0, 125.0)),
    ("a6000", (38.7, 77.4, 154.8, 154.8)),
    ("l40s", (91.6, 183.0, 362.05, 362.05)),
    ("l40", (90.5, 90.5, 181.05, 181.05)),
    ("l4", (30.3, 60.0, 121.0, 121.0)),
    ("6000 ada", (91.1, 182.1, 364.2, 364.2)),
    ("rtx 4090", (82.6, 82.6, 165.2, 165.2)),
    ("rtx 5090", (104.8, 104.8, 209.5, 209.5)),
    ("rtx 3090 ti", (40.0, 40.0, 80.0, 80.0)),
    ("rtx 3090", (35.6, 35.6, 71.0, 71.0)),
    ("t4", (8.1, 0.0, 0.0, 65.0)),
    ("v100s", (16.4, 0.0, 0.0, 130.0)),
    ("v100 pcie", (14.0, 0.0, 0.0, 112.0)),
    ("v100", (15.7, 0.0, 0.0, 125.0)),
    ("mi325x", (163.4, 653.7, 1307.4, 1307.4)),
    ("mi300x", (163.4, 653.7, 1307.4, 1307.4)),
    ("mi250x", (47.9, 0.0, 191.5, 191.5)),  # a device is one of the two halves
    ("mi210", (45.3, 0.0, 181.0, 181.0)),
)
_PARTS = ("mig", "laptop", "d")
"""Words of a part of a GPU, and of smaller GPUs that are named after a larger one."""


def peak_tflops(device: str, kind: Kind) -> float | None:
    """Most operations per second of a GPU's matrix products.

    Args:
        device: name of the device, as `torch.cuda.get_device_name` gives it.
        kind: type that is computed in; "tf32" is float32 with shortened factors.

    Returns:
        10^12 operations per second without sparsity, or None if the device or the type on it is not known. What has no
        units for "tf32" computes it as float32.
    """
    words = device.lower().replace("-", " ").replace("/", " ").split()
    if any(part in words for part in _PARTS):
        return None
    for name, peaks in _PEAKS:
        if all(word in words for word in name.split()):
            peak = dict(zip(KINDS, peaks, strict=True))
            return peak.get(kind) or (peak["float32"] if kind == "tf32" else None)
    return None
