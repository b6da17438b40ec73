"""The accuracies published for a model, and which of them a measured one compares with."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from timm.models import parse_model_name

from res2net_zoo import catalog
from res2net_zoo.catalog import Accuracy
from res2net_zoo.data.sources import Source, held_out_of
from res2net_zoo.utils.card_metadata import read_card


def published_accuracies(name: str) -> list[Accuracy]:
    """Return the accuracies published for a model.

    Args:
        name: As for `create_model`. The source is the catalogue or, for a folder or a repository on
            the Hub, the evaluation results of its model card.

    Returns:
        The accuracies, those to compare with first; empty if none are published.
    """
    source, identifier = parse_model_name(name)
    if source is None:
        checkpoint = catalog.load().checkpoint(name)
        return list(checkpoint.accuracies) if checkpoint else []
    try:
        if source == "local-dir":
            path = Path(identifier) / "README.md"
        else:
            repository, _, revision = identifier.partition("@")
            path = Path(hf_hub_download(repository, "README.md", revision=revision or None))
        card: Any = read_card(path)
        results = card.data.eval_results or []
    except Exception:
        return []  # the card is missing or invalid
    figures: dict[tuple[str, str], dict[str, float]] = {}
    for result in results:
        key = {"accuracy": "top1", "top-5-accuracy": "top5"}.get(result.metric_type)
        if key and isinstance(result.metric_value, int | float):
            figures.setdefault((result.dataset_type, result.dataset_split or ""), {}).setdefault(
                key, float(result.metric_value)
            )
    accuracies = []
    for (dataset, split), values in figures.items():
        with contextlib.suppress(StrictDataclassError, TypeError):  # other cards may lack values or have invalid ones
            accuracies.append(Accuracy(dataset=dataset, split=split, source=f"model card of {identifier}", **values))
    return accuracies


def agrees(top1: float, top5: float, published: Accuracy | None, tolerance: float) -> bool | None:
    """Return whether measured accuracies are the published ones.

    Args:
        top1: The measured top-1 accuracy, in percent.
        top5: The measured top-5 accuracy, in percent.
        published: What to compare with.
        tolerance: Percentage points by which each may differ.

    Returns:
        Whether both agree; None where nothing is published.
    """
    if published is None:
        return None
    # Percentages have three decimals, and their binary difference has stray digits after them.
    return all(round(abs(a - b), 3) <= tolerance for a, b in ((top1, published.top1), (top5, published.top5)))


def find_published(accuracies: Sequence[Accuracy], benchmark: str | None, source: Source) -> Accuracy | None:
    """Return the accuracy to compare with: the first one published for the same images."""
    for accuracy in accuracies:
        if benchmark is not None:
            if accuracy.dataset == benchmark:
                return accuracy
        elif accuracy.split == source.split:
            # A folder has the name of the Hub's repository that it is a copy of, without its owner.
            owned = "/" in accuracy.dataset and "/" in source.name
            if accuracy.dataset.split("/")[0 if owned else -1 :] == source.name.split("/")[0 if owned else -1 :]:
                return accuracy
    return None


def trained_on(accuracies: Sequence[Accuracy], source: Source) -> str | None:
    """Return a warning if a model's card states that it was trained on images of this split."""
    for accuracy in accuracies:
        if accuracy.dataset.split("/")[-1] == source.name.split("/")[-1] and accuracy.split != source.split:
            held = held_out_of(accuracy.split)
            here = held_out_of(source.split)
            whole = here[0] if here else source.split
            if whole == (held[0] if held else "train"):
                return (
                    f"it was trained on images of {source.split} of {source.name}, on which it does better than on new "
                    f"ones; its card's figures are of the split {accuracy.split}"
                )
    return None
