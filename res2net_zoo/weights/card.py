"""Model cards and evaluation results, by huggingface_hub's own classes."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData

from res2net_zoo import catalog
from res2net_zoo.catalog import Accuracy, Checkpoint
from res2net_zoo.utils.markdown import markdown_table
from res2net_zoo.weights.provenance import of_checkpoint

# Names of data sets in the catalogue that are other ones on the Hub.
HUB_DATASETS = {"imagenet-1k": "ILSVRC/imagenet-1k", "imagenette2": "frgfm/imagenette"}

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
        license: As for `model_card_data`, and so are the others.
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
) -> ModelCardData:
    """Return the metadata of a model card, whose evaluation results `published_accuracies` reads back.

    Args:
        name: The model's name.
        license: Its licence, in the Hub's spelling; None if it is unknown.
        accuracies: Its accuracies.
        datasets: What it was trained on, by the Hub's names.
        base_model: Repository on the Hub of the weights that it derives from.
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
        tags=["image-classification", "timm", "res2net"],
        datasets=list(datasets) or None,
        base_model=base_model,
        pipeline_tag="image-classification",
        eval_results=results or None,
    )


def checkpoint_card(checkpoint: Checkpoint, metadata: dict[str, str]) -> ModelCard:
    """Make the card of one of the catalogue's checkpoints.

    Args:
        checkpoint: Which.
        metadata: What its weights' file says of itself: source, source_sha256 and converter.

    Returns:
        The card.
    """
    # Of each dataset the first accuracy is the one to compare with.
    first = {accuracy.dataset: accuracy for accuracy in reversed(checkpoint.accuracies)}
    origin = of_checkpoint(checkpoint, metadata)
    return ModelCard.from_template(
        model_card_data(
            checkpoint.name,
            origin.license,
            list(reversed(first.values())),
            [training_data(checkpoint)],
            origin.base_model,
        ),
        template_path=str(TEMPLATE),
        released=True,
        name=checkpoint.name,
        citation=CITATION,
        **_facts(checkpoint, metadata),
    )


def unreleased_card(checkpoint: Checkpoint, metadata: dict[str, str], name: str) -> ModelCard:
    """Make the card of a file of a release's architecture and format that is not the released one.

    Args:
        checkpoint: Whose architecture and preprocessing it was taken to have.
        metadata: What its weights' file says of itself.
        name: The model's name.

    Returns:
        The card, which claims nothing that nobody has said: no licence, no accuracy.
    """
    return ModelCard.from_template(
        model_card_data(name, None),
        template_path=str(TEMPLATE),
        released=False,
        name=name,
        citation=CITATION,
        architecture=checkpoint.architecture,
        checkpoint=checkpoint.name,
        source=metadata["source"],
        source_sha256=metadata["source_sha256"],
    )


def training_data(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint was trained on, which its tag says."""
    return HUB_DATASETS["imagenette2"] if checkpoint.tag.endswith("imagenette") else "imagenet-1k"


def eval_results(checkpoint: Checkpoint) -> dict[str, list[EvalResultEntry]]:
    """Return a checkpoint's published top-1 accuracies as the Hub's `.eval_results` has them.

    The Hub shows them where the data set is one of its benchmarks, so only those data sets count
    that it has. It knows no second figure of the same data, such as top-5.

    Args:
        checkpoint: Which.

    Returns:
        The entries, by the name of the file that they belong into.
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
    """Tell whether timm has an architecture by itself, whoever answers for it in its registry now."""
    modules = (importlib.import_module(f"timm.models.{name}") for name in ("res2net", "dla"))
    return any(hasattr(module, architecture) for module in modules)


def _facts(checkpoint: Checkpoint, metadata: dict[str, str]) -> dict[str, Any]:
    """Return what the card of a released checkpoint states."""
    architecture = catalog.load().architectures[checkpoint.architecture]
    size = checkpoint.input_size[1]
    licence = checkpoint.license + (f" ({checkpoint.license_note})" if checkpoint.license_note else "")
    papers = ["1904.01169", *(paper.removeprefix("arXiv:") for paper in architecture.papers)]
    details = [
        ("parameters", f"{architecture.parameters / 1e6:.1f} M"),
        ("GMACs", f"{architecture.macs / 1e9:.2f} at {architecture.input_size[1]} x {architecture.input_size[2]}"),
        ("classes", f"{checkpoint.num_classes}, trained on {training_data(checkpoint)}"),
        ("evaluation", f"{size} x {size}, crop {checkpoint.crop_pct}, {checkpoint.interpolation}"),
        ("papers", ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)),
    ]
    released = checkpoint.sha256 or "none was ever published"
    if 0 < len(checkpoint.sha256) < 64:
        released = f"{checkpoint.sha256}..., of which no more was published"
    source = metadata["source"]
    provenance = [
        ("released by", checkpoint.released_by),
        ("original file", f"<{source}>" if source.startswith("https://") else source),
        ("its SHA-256", f"`{metadata['source_sha256']}`"),
        ("as released", released),
        ("licence, as released", licence),
        ("converted by", f"Res2Net Zoo, `hub/convert.py`, version {metadata['converter']} of the conversion"),
    ]
    figures = [(a.dataset, a.split, f"{a.top1:.3f}", f"{a.top5:.3f}", a.source) for a in checkpoint.accuracies]
    has_weights = in_timm(checkpoint.architecture) and checkpoint.hub_id.startswith("timm/")
    return dict(
        title=architecture.title,
        notes=f" {checkpoint.notes[:1].upper()}{checkpoint.notes[1:]}." if checkpoint.notes else "",
        lacking="" if has_weights else "weights" if in_timm(checkpoint.architecture) else "model",
        details=markdown_table(("model", ""), details),
        figures=markdown_table(("dataset", "split", "top-1", "top-5", "source"), figures) if figures else "",
        provenance=markdown_table(("weights", ""), provenance),
        num_features=_num_features(checkpoint),
    )


def _num_features(checkpoint: Checkpoint) -> int:
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(checkpoint.architecture, num_classes=0)
    return int(model.num_features)  # type: ignore[arg-type]
