"""Writing model folders: weights, config, model card and fingerprint, in the layout of timm and the Hub."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from huggingface_hub.utils import yaml_dump
from timm.models import get_model_args
from torch import nn

from res2net_zoo.catalog import Checkpoint
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import finish_replacing, is_temporary, make_readable, temporary_folder
from res2net_zoo.utils.private_apis import save_config_for_hf
from res2net_zoo.weights import bill_of_materials, fingerprint, signature
from res2net_zoo.weights import card as cards
from res2net_zoo.weights.backbone import Backbone
from res2net_zoo.weights.downloads import is_released, save_weights
from res2net_zoo.weights.provenance import KEY, LONGEST, UNKNOWN, Provenance, of_converted

EVAL_RESULTS = ".eval_results"
NOT_KEPT = (EVAL_RESULTS, bill_of_materials.NAME, signature.NAME)  # they describe the old content


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which replaces a folder when the context exits without an error.

    The new folder is created next to the old one and then renamed, so that a reader sees either the old
    or the new content and never a mixture. If the process is killed between the two renames, both
    folders remain and `finish_replacing` completes the second one. Other files of the old folder are kept, except its
    signature and bill of materials.

    Args:
        folder: The folder to replace.
    """
    folder = folder.resolve()
    finish_replacing(folder)
    with temporary_folder(folder) as new:
        yield new
        for path in (new, *new.rglob("*")):
            make_readable(path)
        if not folder.exists():
            new.rename(folder)
            return
        for path in folder.iterdir():
            if not (new / path.name).exists() and path.name not in NOT_KEPT and not is_temporary(path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.copytree(path, new / path.name, symlinks=True)
                else:
                    shutil.copy2(path, new / path.name, follow_symlinks=False)
        old = new.with_name(f".{folder.name}-old-{new.name[-8:]}")
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        with contextlib.suppress(OSError):
            old.rename(new)  # `temporary_folder` removes it


def write_model_folder(
    folder: Path,
    model: nn.Module,
    card: ModelCard,
    label_names: Sequence[str] | None = None,
    metadata: dict[str, str] | None = None,
    eval_results: Mapping[str, Sequence[EvalResultEntry]] | None = None,
    origin: Provenance = UNKNOWN,
) -> None:
    """Write a model as a folder that `timm.create_model("local-dir:FOLDER")` reads, atomically.

    Args:
        folder: The folder to write.
        model: A model from `timm.create_model`.
        card: Its model card.
        label_names: Name of each class.
        metadata: Metadata of the safetensors file.
        eval_results: Files of the folder `.eval_results`, by name.
        origin: Where the weights come from.
    """
    with replaced_folder(folder) as new:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_weights(tensors, new / WEIGHTS, metadata or {})
        write_config(new / "config.json", model, origin, label_names)
        card.save(new / "README.md")
        for name, entries in (eval_results or {}).items():
            (new / EVAL_RESULTS).mkdir(exist_ok=True)
            (new / EVAL_RESULTS / name).write_text(yaml_dump(eval_result_entries_to_yaml(list(entries))))
        fingerprint.write(new)
        bill_of_materials.write(new, folder.resolve().name)


def write_config(path: Path, model: nn.Module, origin: Provenance, label_names: Sequence[str] | None = None) -> None:
    """Write a model's config.json as timm does, but so that transformers loads it, and with its actual origin.

    timm copies the model's pretrained cfg, which describes the published weights even if the model has others, and
    repeats under `model_args` what transformers passes itself.

    Args:
        path: The file.
        model: A model from `timm.create_model`.
        origin: Where its weights come from.
        label_names: Name of each class.
    """
    save_config_for_hf(model, str(path), model_config={"label_names": list(label_names or [])})
    config = json.loads(path.read_text())
    config["model_args"] = own_arguments(config["architecture"], config.get("model_args", {}))
    config["pretrained_cfg"] = origin.applied_to(config["pretrained_cfg"], config["architecture"])
    if origin != UNKNOWN:
        config[KEY] = origin.to_dict()
    path.write_text(json.dumps(config, indent=2) + "\n")


def own_arguments(architecture: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's arguments without those that the rest of its config.json or its architecture determines.

    transformers' `TimmWrapper` passes `num_classes` next to `model_args`, and fails if it is in both. It passes nothing
    of `pretrained_cfg`, so `in_chans` and `global_pool` stay if they differ from the architecture's.

    Args:
        architecture: A registered name.
        arguments: The `model_args` that timm writes.
    """
    with torch.device("meta"):
        defaults = get_model_args(timm.create_model(architecture))
    repeated = {"num_classes"} | {key for key in ("in_chans", "global_pool") if arguments.get(key) == defaults.get(key)}
    return {key: value for key, value in arguments.items() if key not in repeated}


def write_backbone(
    folder: Path,
    architecture: str,
    state: Mapping[str, torch.Tensor],
    preprocessing: Mapping[str, Any],
    origin: Provenance = UNKNOWN,
) -> None:
    """Write a backbone without a classifier as a folder that timm reads as `local-dir:FOLDER`.

    Args:
        folder: The folder to create.
        architecture: The name of the architecture.
        state: State dict of timm's `features_only` model.
        preprocessing: Values that differ from those of the architecture's published weights, such as `mean`.
        origin: Where the weights come from.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(architecture, num_classes=0)
    # These are not the published weights.
    model.pretrained_cfg = {
        "architecture": architecture,
        "input_size": model.pretrained_cfg["input_size"],
        **preprocessing,
    }
    for key in ("first_conv", "classifier", "interpolation", "crop_pct", "pool_size"):
        model.pretrained_cfg[key] = model.default_cfg[key]
    folder.mkdir()
    tensors = {name: state[name].detach().cpu().contiguous() for name in model.state_dict()}
    save_weights(tensors, folder / WEIGHTS, {})
    write_config(folder / "config.json", model, origin)
    bill_of_materials.write(folder, architecture)


def write_converted(
    folder: Path, checkpoint: Checkpoint, state: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a converted checkpoint as a model folder.

    Args:
        folder: The folder to write.
        checkpoint: The checkpoint in the catalogue. If the hash is not the released one, only
            architecture and preprocessing are taken from it.
        state: The state dict.
        metadata: Metadata of the safetensors file.

    Raises:
        InputError: The folder cannot be written.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(checkpoint.architecture, num_classes=checkpoint.num_classes)
    model.load_state_dict(state, strict=True, assign=True)
    cfg: Any = timm.get_pretrained_cfg(checkpoint.name)
    model.pretrained_cfg = {**cfg.to_dict(), "architecture": checkpoint.architecture, "tag": checkpoint.tag}
    results: dict[str, list[EvalResultEntry]] = {}
    if is_released(checkpoint, metadata):
        card, results = cards.checkpoint_card(checkpoint, metadata), cards.eval_results(checkpoint)
    else:
        card = cards.unreleased_card(checkpoint, metadata, folder.resolve().name)
    try:
        origin = of_converted(checkpoint, metadata)
        write_model_folder(folder, model, card, metadata=metadata, eval_results=results, origin=origin)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error


def write_found(folder: Path, backbone: Backbone, metadata: dict[str, str]) -> None:
    """Write a backbone that was found in a checkpoint as a model folder.

    Args:
        folder: The folder to write.
        backbone: The backbone.
        metadata: Metadata of the safetensors file: source, source_sha256 and converter.

    Raises:
        InputError: The folder cannot be written.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(backbone.architecture, num_classes=backbone.num_classes, **backbone.model_args)
    model.load_state_dict(backbone.state, strict=True, assign=True)
    card = cards.backbone_card(backbone, metadata, folder.resolve().name)
    origin = Provenance(
        origin="file", source=printable(metadata["source"])[:LONGEST], source_sha256=metadata["source_sha256"]
    )
    try:
        write_model_folder(folder, model, card, metadata=metadata, origin=origin)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
