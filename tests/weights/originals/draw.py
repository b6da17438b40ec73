"""What the makers share: the small model's tensors and values, each drawn from its own original name."""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
BATCHES = 100


def parameter(name: str, shape: list[int], kind: str) -> np.ndarray:
    """Draw a tensor from its own name; a count of batches is always the same."""
    if kind == "count":
        return np.array(BATCHES, dtype="int64")
    n = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape).astype("float32")
    values = {
        # In double precision, as NumPy 2 does of itself and NumPy 1 does not.
        "conv": lambda: n.astype("float64") * np.sqrt(2.0 / np.prod(shape[1:])),
        "fc": lambda: n * 0.02,
        "gamma": lambda: 0.6 * (1 + 0.2 * n),
        "var": lambda: 1 + 0.5 * np.abs(n),
    }.get(kind, lambda: 0.1 * n)()
    return values.astype("float32")


def images(height: int, width: int) -> np.ndarray:
    """Return the batch that reference logits are computed for."""
    return np.random.RandomState(7).standard_normal((2, 3, height, width)).astype("float32")


def tensors(framework: str) -> dict[str, np.ndarray]:
    """Return the small model's tensors under a framework's own names, in timm's order."""
    rows = json.loads((HERE / "small.json").read_text())[framework]
    return {row["name"]: parameter(row["name"], row["shape"], row["kind"]) for row in rows}
