"""The model card of a trained classifier, from the template card.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from huggingface_hub import ModelCard

from res2net_zoo.catalog import Accuracy
from res2net_zoo.data.preprocessing import color_mode
from res2net_zoo.evaluation import Counts
from res2net_zoo.training.data import TrainingData
from res2net_zoo.training.metrics import best_of
from res2net_zoo.utils.command_line import printable
from res2net_zoo.utils.markdown import code_span, markdown, markdown_table
from res2net_zoo.weights.card import CITATION, model_card_data
from res2net_zoo.weights.provenance import Provenance

TEMPLATE = Path(__file__).with_name("card.md")
MOST_NAMES = 50  # classes that the card lists


class Run(Protocol):
    """What the card states about a run: attributes of `Report`."""

    settings: dict[str, Any]
    data: TrainingData
    config: dict[str, Any]
    origin: Provenance
    hardware: str
    command: str
    metrics: list[dict[str, Any]]
    samples: int
    final: Counts | None


def training_card(
    report: Run,
    folder: Path,
    kinds: Sequence[str],
    mistakes: Sequence[tuple[int, int, int, int]] | None = None,
    pictures: Sequence[str] = (),
) -> ModelCard:
    """Return the card of the best model of a run.

    Args:
        report: The report of the run.
        folder: The model's folder, whose name is that of the model.
        kinds: Weights to choose the best of, as for `best_of`.
        mistakes: Its most frequent mistakes, as `Mistakes.pairs` returns them, once training is complete.
        pictures: Names of the pictures in the folder.
    """
    data, origin, settings = report.data, report.origin, report.settings
    top1, epoch, kind = best_of(report.metrics, kinds)
    top5 = report.metrics[epoch - 1][f"{kind}top5"]
    if report.final is not None:
        top1, top5 = report.final.percent(report.final.top1), report.final.percent(report.final.top5)
    name = folder.resolve().name
    accuracy = Accuracy(
        dataset=data.valid.name, split=data.valid.split, top1=top1, top5=top5, source="res2net-zoo finetune"
    )
    from_hub = data.train.name == settings["data"] and not Path(data.train.name).exists()
    precision = settings.get("mixed_precision", "no")
    return ModelCard.from_template(
        model_card_data(
            name, origin.license, [accuracy], [data.train.name] if from_hub else [], base_model=origin.base_model
        ),
        template_path=str(TEMPLATE),
        title=markdown(name),
        local_name=json.dumps(f"local-dir:{folder.name}"),
        folder_name=json.dumps(folder.name),
        top1=f"{top1:.3f}",
        top5=f"{top5:.3f}",
        measured_in=f" (measured in {precision})" * (report.final is None and precision != "no"),
        samples=f"{report.samples:,}",
        epoch=epoch,
        epochs=len(report.metrics),
        average=", by a moving average of the weights" * bool(kind),
        mistakes="" if mistakes is None else mistakes_table(mistakes, data.names),
        pictures=pictures,
        **facts_of_data(data, settings),
        **facts_of_run(report),
    )


def facts_of_data(data: TrainingData, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the template variables about the data."""
    images = "a stream of images" if data.indices is None else f"{data.num_images:,} images"
    if (counts := data.used_counts) and min(counts) < max(counts):
        images += f", {min(counts):,} to {max(counts):,} of each class,"
    held_out = f", held out of `{data.train.split}`: {settings['hold_out']:g} of each class"
    return dict(
        num_classes=len(data.names),
        class_names=", ".join(map(code_span, data.names[:MOST_NAMES])) + ", ..." * (len(data.names) > MOST_NAMES),
        trained_on=code_span(data.train.name),
        trained_images=images,
        train_split=data.train.split,
        valid_split=data.valid.split,
        held_out=held_out * ("/held-out-" in data.valid.split),
    )


def facts_of_run(report: Run) -> dict[str, Any]:
    """Return the template variables about the model and its training."""
    size = report.config["input_size"]
    speeds = [row["images_per_second"] for row in report.metrics if row["images_per_second"]]
    settings = [(key, markdown(json.dumps(value, default=str))) for key, value in report.settings.items()]
    origin = report.origin
    return dict(
        architecture=report.config["architecture"],
        input_size=" x ".join(map(str, size)),
        mode=color_mode(report.config),
        start="pretrained" if origin.start else "random",
        origin=markdown(str(origin)) if origin.start or origin.teacher else "",
        command=printable(report.command),
        versions=f"torch {torch.__version__.split('+')[0]} and timm {timm.__version__}",
        hardware=report.hardware,
        speed=f"{speeds[-1]:g} images/s, " if speeds else "",
        memory=f"{report.metrics[-1]['peak_memory_mb']:,}",
        settings=markdown_table(("setting", "value"), settings),
        citation=CITATION,
    )


def mistakes_table(mistakes: Sequence[tuple[int, int, int, int]], names: Sequence[str]) -> str:
    """Return a sentence and a Markdown table of the most frequent mistakes, or a sentence if there are none."""
    rows = [
        (markdown(names[right]), markdown(names[answer]), number, f"{100 * number / of:.1f}")
        for right, answer, number, of in mistakes
    ]
    if not rows:
        return "All images of this split are classified correctly."
    return "The most frequent, on this split:\n\n" + markdown_table(
        ("class", "prediction", "images", "% of the class"), rows
    )
