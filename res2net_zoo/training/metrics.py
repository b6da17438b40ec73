"""The metrics of a run, one row per epoch."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from res2net_zoo.utils.files import write_atomically


def write_metrics(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.csv, one row per epoch."""

    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, metrics[0].keys())
            writer.writeheader()
            writer.writerows(metrics)

    write_atomically(folder / "metrics.csv", write)


def best_of(metrics: Sequence[Mapping[str, Any]], kinds: Sequence[str] = ("", "ema_")) -> tuple[float, int, str]:
    """Return the best top-1, its epoch (the latest on ties) and the kind of weights.

    Args:
        metrics: Metrics of each epoch.
        kinds: Weights to consider: "" for the trained ones, "ema_" for their moving average.
    """
    return max((row[f"{kind}top1"], row["epoch"], kind) for row in metrics for kind in kinds if f"{kind}top1" in row)
