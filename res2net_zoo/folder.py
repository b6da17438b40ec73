"""A model folder: model.safetensors, config.json and README.md, as timm reads and the Hub keeps it."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models._hub import save_config_for_hf
from torch import nn

from res2net_zoo.catalog import Accuracy
from res2net_zoo.program import make_readable
from res2net_zoo.weights import WEIGHTS, save_weights


def write_model_folder(
    folder: Path,
    model: nn.Module,
    card: ModelCard,
    label_names: Sequence[str] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a model as a folder that `timm.create_model("local-dir:FOLDER")` reads.

    The folder is made beside its place and then renamed, so that it is the old one or the new one,
    whole, and never holds a new weight with an old card. Killed in the instant between the two
    renames it leaves the old one as `.FOLDER-old-*`. Files of an old folder that are none of these
    three move along.

    Args:
        folder: Where to write it.
        model: A model that `timm.create_model` made.
        card: Its card.
        label_names: Name of each class.
        metadata: What the weights' file is to say of itself.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-new-"))
    old = new.with_name(new.name.replace("-new-", "-old-"))
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_weights(tensors, new / WEIGHTS, metadata or {})
        save_config_for_hf(model, str(new / "config.json"), model_config={"label_names": list(label_names or [])})
        card.save(new / "README.md")
        for path in (new, *new.iterdir()):
            make_readable(path)
        if folder.exists():
            for path in folder.iterdir():
                if not (new / path.name).exists():
                    (shutil.copytree if path.is_dir() else shutil.copy2)(path, new / path.name)
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():  # else the only good copy is the old one
            shutil.rmtree(old, ignore_errors=True)


def model_card(
    name: str,
    text: str,
    license: str | None,
    accuracies: Sequence[Accuracy] = (),
) -> ModelCard:
    """Make a model card whose evaluation results `published_accuracies` reads back.

    Args:
        name: The model's name.
        text: The card's Markdown.
        license: Its licence, in the Hub's spelling; None where nobody has said.
        accuracies: Its accuracies.

    Returns:
        The card.
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
    data = ModelCardData(
        model_name=re.sub(r"[^\w.-]", "_", name),
        library_name="timm",
        license=license,
        tags=["image-classification", "timm", "res2net"],
        pipeline_tag="image-classification",
        eval_results=results or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
