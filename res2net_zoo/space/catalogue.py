"""The catalogue as the page shows it: a table to filter, cards, and speed on this machine."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import timm
import torch

from res2net_zoo import catalog
from res2net_zoo.catalog import Architecture, Checkpoint
from res2net_zoo.inference.forward import create_forward
from res2net_zoo.space.models import Models, call_of
from res2net_zoo.utils.timing import latencies

SPEED = "images/s"
AXES = ("params (M)", "GMACs", SPEED)
TOP1 = "top-1"
ORDERS = (TOP1, *AXES, "model", "family")
ROUNDS = 3


def table(speeds: Mapping[str, float]) -> pd.DataFrame:
    """Return all checkpoints, and the models without weights.

    Args:
        speeds: Measured images per second, by architecture.
    """
    return pd.DataFrame([row(*entry, speeds.get(entry[0].name)) for entry in catalog.load().entries()])


def row(
    architecture: Architecture, checkpoint: Checkpoint | None, speed: float | None
) -> dict[str, str | float | None]:
    """Return a row of the table, by column."""
    accuracy = checkpoint.imagenet_accuracy if checkpoint else None
    note = "*" if checkpoint and checkpoint.license_note else ""
    return {
        "model": checkpoint.name if checkpoint else architecture.name,
        TOP1: accuracy.top1 if accuracy else None,
        "top-5": accuracy.top5 if accuracy else None,
        "params (M)": round(architecture.parameters / 1e6, 2),
        "GMACs": round(architecture.macs / 1e9, 2),
        SPEED: None if speed is None else round(speed, 1),
        "pixels": architecture.input_size[1],
        "licence": checkpoint.license + note if checkpoint else "-",
        "released by": checkpoint.released_by if checkpoint else "no weights",
    }


def matching(frame: pd.DataFrame, words: str, most_parameters: float, least_top1: float) -> pd.DataFrame:
    """Return the rows that contain all words in name, licence or publisher, and are within the limits.

    Args:
        frame: As from `table`.
        words: Words, separated by spaces, in any case.
        most_parameters: Maximum parameters in millions.
        least_top1: Minimum top-1 accuracy on ImageNet-1k in percent; 0 includes models without one.
    """
    text = frame["model"] + " " + frame["licence"] + " " + frame["released by"]
    keep = frame["params (M)"] <= most_parameters
    for word in words.split():
        keep &= text.str.contains(word, case=False, regex=False)
    if least_top1:
        keep &= frame[TOP1].astype(float) >= least_top1
    return frame[keep]


def ordered(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """Return the rows in another order: costs and names ascending, accuracy and speed descending.

    Args:
        frame: As from `table`.
        by: One of `ORDERS`; `family` is the order of the catalogue.
    """
    if by == "family":
        return frame
    return frame.sort_values(by, ascending=by not in (TOP1, SPEED), kind="stable", na_position="last")


def points(frame: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Return the rows that can be drawn, with the licences as they are in the legend.

    Args:
        frame: As from `table`.
        axis: One of `AXES`.
    """
    return frame.dropna(subset=[axis, TOP1]).assign(licence=lambda rows: rows["licence"].str.rstrip("*"))


def names() -> list[str]:
    """Return the names in the table, in its order."""
    return [
        checkpoint.name if checkpoint else architecture.name for architecture, checkpoint in catalog.load().entries()
    ]


def card(name: str) -> str:
    """Return the facts about a model as Markdown, in lists, which fit a narrow page.

    Args:
        name: One of `names`.
    """
    everything = catalog.load()
    checkpoint = everything.checkpoints.get(name)
    architecture = everything.architectures[checkpoint.architecture if checkpoint else name]
    facts = [
        f"parameters: {architecture.parameters:,} with {architecture.num_classes:,} classes",
        f"GMACs: {architecture.macs / 1e9:.3f} at {' x '.join(map(str, architecture.input_size[1:]))}",
        *([f"difference from the printed size: {architecture.difference}"] if architecture.difference else []),
        *(weights(checkpoint) if checkpoint else ["weights: none in the catalogue"]),
    ]
    accuracies = [
        f"{a.top1:.3f} top-1, {a.top5:.3f} top-5 on {a.dataset} ({a.split}): {a.source}"
        for a in (checkpoint.accuracies if checkpoint else ())
    ]
    larger = [f"{x.model}, {x.dataset}: {x.text}: {x.source}" for x in (checkpoint.downstream if checkpoint else ())]
    parts = [f"### {name}", architecture.title, bullets(facts)]
    for title, lines in (("Published accuracies", accuracies), ("Published results as a backbone", larger)):
        parts += [f"**{title}**", bullets(lines)] if lines else []
    return "\n\n".join(parts)


def weights(checkpoint: Checkpoint) -> list[str]:
    """Return the facts about a checkpoint."""
    size = " x ".join(map(str, checkpoint.input_size[1:]))
    return [
        f"licence: {checkpoint.license}" + (f" ({checkpoint.license_note})" if checkpoint.license_note else ""),
        f"released by: {checkpoint.released_by}",
        f"original file: {checkpoint.url or 'no direct download'}",
        f"SHA-256: {checkpoint.sha256 or 'not published'}",
        *([f"on the Hub: {checkpoint.hub_id}"] if checkpoint.hub_id else []),
        f"evaluation: {size}, crop {checkpoint.crop_pct}, {checkpoint.interpolation}",
        f"classes: {checkpoint.num_classes or 'none, a backbone without a classifier'}",
        *([f"notes: {checkpoint.notes}"] if checkpoint.notes else []),
    ]


def bullets(lines: Sequence[str]) -> str:
    """Return lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def call(name: str) -> str:
    """Return the Python code that creates a model of the table."""
    return call_of(name, name in catalog.load().checkpoints)


def measure(models: Models, architectures: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Measure how many single images models classify per second, with random weights, which do not affect speed.

    Args:
        models: Determines device and backend.
        architectures: The models.

    Yields:
        Each model with its images per second.
    """
    for name in architectures:
        model: Any = timm.create_model(name)
        model = model.eval().to(models.accelerator.device, memory_format=torch.channels_last)
        size = catalog.load().architectures[name].input_size
        image = torch.randn(1, *size, device=models.accelerator.device)
        forward = create_forward(model, models.backend, models.accelerator, 1).call
        (milliseconds,) = latencies([lambda: forward(image)], ROUNDS)  # noqa: B023  called before the next turn
        yield name, 1000 / milliseconds
