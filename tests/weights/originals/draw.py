"""Shared by the make scripts: the tensors of the small model, with values seeded by their names."""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
BATCHES = 100


def parameter(name: str, shape: list[int], kind: str) -> np.ndarray:
    """Draw a tensor, seeded by its name; the number of batches is constant."""
    if kind == "count":
        return np.array(BATCHES, dtype="int64")
    n = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape).astype("float32")
    values = {
        # In double precision, which is the default only in NumPy 2.
        "conv": lambda: n.astype("float64") * np.sqrt(2.0 / np.prod(shape[1:])),
        "fc": lambda: n * 0.02,
        "gamma": lambda: 0.6 * (1 + 0.2 * n),
        "var": lambda: 1 + 0.5 * np.abs(n),
    }.get(kind, lambda: 0.1 * n)()
    return values.astype("float32")


def images(height: int, width: int) -> np.ndarray:
    """Return the input of the reference logits."""
    return np.random.RandomState(7).standard_normal((2, 3, height, width)).astype("float32")


def tensors(framework: str) -> dict[str, np.ndarray]:
    """Return the tensors of the small model with the names of a framework, in timm's order."""
    rows = json.loads((HERE / "small.json").read_text())[framework]
    return {row["name"]: parameter(row["name"], row["shape"], row["kind"]) for row in rows}
