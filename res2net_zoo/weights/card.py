"""Model cards and evaluation results, built with huggingface_hub's classes."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData

from res2net_zoo import catalog
from res2net_zoo.catalog import Accuracy, Checkpoint
from res2net_zoo.utils.markdown import code_span, markdown, markdown_table
from res2net_zoo.weights.backbone import Backbone
from res2net_zoo.weights.provenance import of_checkpoint

# Datasets of the catalogue and their ids on the Hub.
HUB_DATASETS = {
    "imagenet-1k": "ILSVRC/imagenet-1k",
    "imagenette2": "frgfm/imagenette",
    "COCO": "detection-datasets/coco",
}

WIRINGS = {"official": "the authors'", "paddle": "PaddleClas's", "mmdet": "MMDetection's"}

TEMPLATE = Path(__file__).with_name("card.md")
CITATION = """\
```bibtex
@article{gao2019res2net,
  title   = {Res2Net: A New Multi-scale Backbone Architecture},
  author  = {Gao, Shang-Hua and Cheng, Ming-Ming and Zhao, Kai and Zhang, Xin-Yu and
             Yang, Ming-Hsuan and Torr, Philip},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year    = {2021},
  doi     = {10.1109/TPAMI.2019.2938758}
}
```"""


def model_card(
    name: str,
    text: str,
    license: str | None,
    accuracies: Sequence[Accuracy] = (),
    datasets: Sequence[str] = (),
    base_model: str | None = None,
) -> ModelCard:
    """Return a model card of the metadata that `model_card_data` returns.

    Args:
        name: The model's name.
        text: The card's Markdown.
        license: Its licence, see `model_card_data`.
        accuracies: Its accuracies.
        datasets: What it was trained on.
        base_model: What it derives from.
    """
    data = model_card_data(name, license, accuracies, datasets, base_model)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def model_card_data(
    name: str,
    license: str | None,
    accuracies: Sequence[Accuracy] = (),
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    task: str = "image-classification",
) -> ModelCardData:
    """Return the metadata of a model card, whose evaluation results `published_accuracies` reads back.

    Args:
        name: The model's name.
        license: Its licence, in the Hub's spelling; None if it is unknown.
        accuracies: Its accuracies.
        datasets: What it was trained on, by the Hub's names.
        base_model: Repository on the Hub of the weights that it derives from.
        task: Its task, by the Hub's name.
    """
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=accuracy.dataset,
            dataset_name=accuracy.dataset,
            dataset_split=accuracy.split,
            metric_type=metric,
            metric_name=title,
            metric_value=value,
        )
        for accuracy in accuracies
        for metric, title, value in (
            ("accuracy", "Top-1 accuracy", accuracy.top1),
            ("top-5-accuracy", "Top-5 accuracy", accuracy.top5),
        )
    ]
    return ModelCardData(
        model_name=re.sub(r"[^\w.-]", "_", name),
        library_name="timm",
        license=license,
        tags=[task, "timm", "res2net"],
        datasets=list(datasets) or None,
        base_model=base_model,
        pipeline_tag=task,
        eval_results=results or None,
    )


def checkpoint_card(checkpoint: Checkpoint, metadata: dict[str, str]) -> ModelCard:
    """Make the model card of a checkpoint in the catalogue.

    Args:
        checkpoint: The checkpoint.
        metadata: Metadata of its safetensors file: source, source_sha256 and converter.

    Returns:
        The card.
    """
    # The first accuracy of each dataset is the one that validation compares with.
    first = {accuracy.dataset: accuracy for accuracy in reversed(checkpoint.accuracies)}
    origin = of_checkpoint(checkpoint, metadata)
    return ModelCard.from_template(
        model_card_data(
            checkpoint.name,
            origin.license,
            list(reversed(first.values())),
            training_data(checkpoint),
            origin.base_model,
            task_of(checkpoint.num_classes),
        ),
        template_path=str(TEMPLATE),
        released=True,
        name=checkpoint.name,
        citation=CITATION,
        **_facts(checkpoint, metadata),
    )


def unreleased_card(checkpoint: Checkpoint, metadata: dict[str, str], name: str) -> ModelCard:
    """Make the model card of weights converted from a file that differs from the released one.

    Args:
        checkpoint: The checkpoint whose architecture and preprocessing were assumed.
        metadata: Metadata of its safetensors file.
        name: The model's name.

    Returns:
        The card, without licence and accuracies.
    """
    return ModelCard.from_template(
        model_card_data(name, None, task=task_of(checkpoint.num_classes)),
        template_path=str(TEMPLATE),
        released=False,
        name=name,
        citation=CITATION,
        architecture=checkpoint.architecture,
        checkpoint=checkpoint.name,
        source=metadata["source"],
        source_sha256=metadata["source_sha256"],
    )


def backbone_card(backbone: Backbone, metadata: dict[str, str], name: str) -> ModelCard:
    """Make the model card of a backbone extracted from a checkpoint.

    Args:
        backbone: The backbone.
        metadata: Metadata of its safetensors file.
        name: The model's name.

    Returns:
        The card, without licence and accuracies.
    """
    details = [
        ("architecture", backbone.architecture),
        ("wiring", f"{backbone.wiring}: {backbone.reason}"),
        ("prefix in the file", code_span(backbone.prefix) if backbone.prefix else "none"),
        ("classes", str(backbone.num_classes or "none: a backbone without a classifier")),
        ("tensors", f"{len(backbone.state)}; {len(backbone.left_out)} others of the file are left out"),
        ("converted by", f"Res2Net Zoo, conversion version {metadata['converter']}"),
    ]
    return ModelCard.from_template(
        model_card_data(name, None, task=task_of(backbone.num_classes)),
        template_path=str(TEMPLATE.with_name("backbone_card.md")),
        name=markdown(name),
        citation=CITATION,
        architecture=backbone.architecture,
        details=markdown_table(("backbone", ""), details),
        num_classes=backbone.num_classes,
        source=markdown(metadata["source"]),
        source_sha256=metadata["source_sha256"],
    )


def task_of(num_classes: int) -> str:
    """Return the task of a model with or without a classifier, by the Hub's name."""
    return "image-classification" if num_classes else "image-feature-extraction"


def training_data(checkpoint: Checkpoint) -> list[str]:
    """Return the training datasets of a checkpoint, which its tag and its downstream results indicate."""
    first = HUB_DATASETS["imagenette2"] if checkpoint.tag.endswith("imagenette") else "imagenet-1k"
    return [first, *(HUB_DATASETS[result.dataset] for result in checkpoint.downstream)]


def eval_results(checkpoint: Checkpoint) -> dict[str, list[EvalResultEntry]]:
    """Return a checkpoint's published top-1 accuracies in the Hub's `.eval_results` format.

    The Hub displays them for datasets that are registered as benchmarks, so other datasets are
    omitted. It supports one metric per dataset, so top-5 is omitted as well.

    Args:
        checkpoint: The checkpoint.

    Returns:
        The entries, by file name.
    """
    size, crop, interpolation = checkpoint.input_size[1], checkpoint.crop_pct, checkpoint.interpolation
    entries: dict[str, list[EvalResultEntry]] = {}
    for accuracy in checkpoint.accuracies:
        if accuracy.dataset in HUB_DATASETS and f"{accuracy.dataset}.yaml" not in entries:
            url = catalog.load().url_of(accuracy.source)
            entry = EvalResultEntry(
                dataset_id=HUB_DATASETS[accuracy.dataset],
                task_id="default",
                value=accuracy.top1,
                source_url=url,
                source_name=accuracy.source,
                notes=f"top-1 in percent on the split {accuracy.split}, {size} pixels, crop {crop}, {interpolation}",
            )
            entries[f"{accuracy.dataset}.yaml"] = [entry]
    return entries


def in_timm(architecture: str) -> bool:
    """Return whether timm itself has an architecture, even if the zoo has replaced its entry in the registry."""
    modules = (importlib.import_module(f"timm.models.{name}") for name in ("res2net", "dla"))
    return any(hasattr(module, architecture) for module in modules)


def _facts(checkpoint: Checkpoint, metadata: dict[str, str]) -> dict[str, Any]:
    """Return what the card of a released checkpoint states."""
    architecture = catalog.load().architectures[checkpoint.architecture]
    num_features, wiring = _num_features_and_wiring(checkpoint)
    size = checkpoint.input_size[1]
    licence = checkpoint.license + (f" ({checkpoint.license_note})" if checkpoint.license_note else "")
    papers = ["1904.01169", *(paper.removeprefix("arXiv:") for paper in architecture.papers)]
    details = [
        ("parameters", f"{architecture.parameters / 1e6:.1f} M with {architecture.num_classes:,} classes"),
        ("GMACs", f"{architecture.macs / 1e9:.2f} at {architecture.input_size[1]} x {architecture.input_size[2]}"),
        ("wiring", f"{WIRINGS[wiring]} (`{wiring}`)"),
        ("classes", f"{checkpoint.num_classes or 'none'}, trained on {' and '.join(training_data(checkpoint))}"),
        ("evaluation", f"{size} x {size}, crop {checkpoint.crop_pct}, {checkpoint.interpolation}"),
        ("papers", ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)),
    ]
    released = checkpoint.sha256 or "not published"
    if 0 < len(checkpoint.sha256) < 64:
        released = f"{checkpoint.sha256}... (only these digits were published)"
    source = metadata["source"]
    provenance = [
        ("released by", checkpoint.released_by),
        ("original file", f"<{source}>" if source.startswith("https://") else source),
        ("SHA-256", f"`{metadata['source_sha256']}`"),
        ("published SHA-256", released),
        ("published licence", licence),
        ("converted by", f"Res2Net Zoo, conversion version {metadata['converter']}"),
    ]
    figures = [(a.dataset, a.split, f"{a.top1:.3f}", f"{a.top5:.3f}", a.source) for a in checkpoint.accuracies]
    downstream = [(x.model, x.dataset, x.text, x.source) for x in checkpoint.downstream]
    has_weights = in_timm(checkpoint.architecture) and checkpoint.hub_id.startswith("timm/")
    return dict(
        title=architecture.title,
        notes=f" {checkpoint.notes[:1].upper()}{checkpoint.notes[1:]}." if checkpoint.notes else "",
        lacking="" if has_weights else "weights" if in_timm(checkpoint.architecture) else "model",
        details=markdown_table(("model", ""), details),
        figures=markdown_table(("dataset", "split", "top-1", "top-5", "source"), figures) if figures else "",
        downstream=markdown_table(("backbone of", "dataset", "result", "source"), downstream) if downstream else "",
        provenance=markdown_table(("weights", ""), provenance),
        num_classes=checkpoint.num_classes,
        num_features=num_features,
    )


def _num_features_and_wiring(checkpoint: Checkpoint) -> tuple[int, str]:
    import timm
    import torch

    with torch.device("meta"):
        model: Any = timm.create_model(checkpoint.architecture, num_classes=0)
    return model.num_features, next(module.wiring for module in model.modules() if hasattr(module, "wiring"))
