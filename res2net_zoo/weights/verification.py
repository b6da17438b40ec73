"""Verify a model folder: hashes, bill of materials, catalogue, strict loading, logits."""

import math
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from res2net_zoo import catalog
from res2net_zoo.catalog import Checkpoint
from res2net_zoo.utils import card_metadata
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import read_json, sha256_of
from res2net_zoo.weights import bill_of_materials, fingerprint, model_config
from res2net_zoo.weights.checks import Check
from res2net_zoo.weights.convert import explain
from res2net_zoo.weights.model_config import ModelConfig
from res2net_zoo.weights.provenance import metadata_of, of_folder


def verify(folder: Path, wanted: Checkpoint | None = None) -> list[Check]:
    """Check a model folder against its own records and the catalogue.

    Args:
        folder: The folder.
        wanted: The checkpoint that it must be; None to identify it by its own metadata.

    Returns:
        The checks, in order. If the weights cannot be loaded, this is the last one.

    Raises:
        InputError: It is not a model folder.
    """
    config, name = read_config(folder)
    checkpoint = wanted or identify(folder)
    stored = fingerprint.read(folder)
    digest = sha256_of(folder / WEIGHTS)
    checks = [
        _compare(f"SHA-256 of {WEIGHTS}", digest, stored.sha256 if stored else "", fingerprint.NAME),
        bill_of_materials.check(folder),
        *_against_catalogue(folder, config, digest, checkpoint),
    ]
    if wanted:
        checks.append(Check("name", name, wanted.name, name == wanted.name))
    model_config.build_on_meta(config)  # raises an error for an invalid config before the weights are checked
    checks += [check_provenance(folder), *check_card(folder)]
    every = "every tensor exactly once"
    try:
        model_config.check_weights(config, folder / WEIGHTS)
        with torch.random.fork_rng(devices=[]):  # timm initializes the model with random weights
            model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
        tensors = load_file(folder / WEIGHTS)
        model.load_state_dict(tensors, strict=True)
    except (InputError, SafetensorError, RuntimeError, OSError) as error:
        return [*checks, Check("strict load", explain(error), every, False)]
    checks += [Check("strict load", f"{len(tensors)} tensors", every, True), check_values(tensors)]
    return [*checks, _logits(folder, model, stored)]


def _against_catalogue(folder: Path, config: ModelConfig, digest: str, checkpoint: Checkpoint | None) -> list[Check]:
    """Compare a folder with a checkpoint of the catalogue: hashes and preprocessing."""
    if checkpoint is None:
        return [Check("catalogue", "not a checkpoint of it", "-", None)]
    source = metadata_of(folder / WEIGHTS).get("source_sha256", "")
    known = checkpoint.sha256 if source else ""
    original = _compare("SHA-256 of the original", source or "not recorded", known, "the release")
    if known:  # some releases publish only the first digits
        original = original._replace(passed=source.startswith(known))
    checks = [Check("catalogue", checkpoint.name, "-", None)]
    if checkpoint.hub_sha256:
        checks.append(_compare(f"SHA-256 of {WEIGHTS}", digest, checkpoint.hub_sha256, "the catalogue"))
    return [*checks, original, _preprocessing(config.pretrained_cfg, checkpoint)]


def _logits(folder: Path, model: nn.Module, stored: fingerprint.Stored | None) -> Check:
    """Compare a model's logits with those of the folder's fingerprint."""
    if not stored:
        return Check("logits", "-", f"no {fingerprint.NAME}", None)
    try:
        apart = fingerprint.difference(fingerprint.logits(model, stored.input_size), stored.logits)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / fingerprint.NAME} does not fit the model: {one_line(error)}") from error
    found = "not comparable" if math.isinf(apart) else f"{apart:.1e} from the stored ones"
    return Check("logits", found, f"within {fingerprint.TOLERANCE:.0e}", apart <= fingerprint.TOLERANCE)


def is_of_task(folder: Path) -> bool:
    """Return whether a folder has a model for a task beyond classification."""
    try:
        return isinstance(read_json(folder / "config.json")["task"], str)
    except (InputError, KeyError, TypeError):
        return False


def check_provenance(folder: Path) -> Check:
    """Report a folder's provenance, which no other record can confirm."""
    return Check("provenance", str(of_folder(folder)), "-", None)


def check_values(tensors: dict[str, torch.Tensor]) -> Check:
    """Check that all floating-point tensors are finite."""
    odd = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    return Check("values", f"NaN or infinite in {odd[0]}" if odd else "finite", "finite", not odd)


def check_card(folder: Path) -> list[Check]:
    """Check that a folder's README.md is a model card with metadata and a licence.

    Returns:
        A failed or undecided check; empty if everything is there.
    """
    wanted = "README.md with metadata"
    if not (folder / "README.md").exists() and not (folder / "README.md").is_symlink():
        return [Check("card", "no README.md", wanted, None)]
    try:
        license = read_card(folder).data.get("license")
    except InputError as error:
        return [Check("card", str(error), wanted, False)]
    return [] if license else [Check("card", "no licence", wanted, None)]


def read_card(folder: Path) -> ModelCard:
    """Read a folder's model card.

    Raises:
        InputError: The card is missing or invalid.
    """
    path = folder / "README.md"
    try:
        card = card_metadata.read_card(path)
        if not card.data.to_dict():
            raise ValueError("it does not start with metadata between two lines of ---")
    except Exception as error:
        # huggingface_hub may raise various errors for invalid YAML.
        raise InputError(f"{path} is not a model card: {one_line(error)}") from error
    return card


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """Read and check a model folder's config.

    Returns:
        The config, and the `arch.tag` in it.

    Raises:
        InputError: The config is invalid, or the weights are missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a model folder: it does not exist")
    try:
        config = model_config.read(folder / model_config.NAME)
    except InputError as error:
        raise InputError(f"{folder} is not a model folder: {error}") from error
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}, so it is not a model folder")
    return config, f"{config.architecture}.{config.pretrained_cfg.get('tag')}"


def identify(folder: Path) -> Checkpoint | None:
    """Return the checkpoint of the catalogue that a model folder contains, or None.

    The name in the config is not sufficient, because timm keeps the tag after fine-tuning. Converted
    weights are identified by the metadata of their file.

    Raises:
        InputError: It is not a model folder.
    """
    if is_of_task(folder):
        return None
    _, name = read_config(folder)
    checkpoints, metadata = catalog.load().checkpoints, metadata_of(folder / WEIGHTS)
    if not metadata.get("source_sha256"):
        return None
    same = [c for c in checkpoints.values() if c.sha256 and metadata["source_sha256"].startswith(c.sha256)]
    same += [c for c in checkpoints.values() if c.url and c.url == metadata.get("source")]
    return checkpoints.get(name) or (same[0] if same else None)


def _compare(what: str, found: str, expected: str, by: str) -> Check:
    if not expected:
        return Check(what, found, f"not recorded in {by}", None)
    return Check(what, found, f"{expected} ({by})", found == expected)


def _preprocessing(config: dict[str, Any], checkpoint: Checkpoint) -> Check:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple | list) else value

    wrong = [key for key in fingerprint.PREPROCESSING if plain(config.get(key)) != plain(getattr(checkpoint, key))]
    found = ", ".join(f"{key} {plain(config.get(key))}" for key in wrong) or "the same"
    expected = ", ".join(f"{key} {plain(getattr(checkpoint, key))}" for key in wrong) or "the catalogue's"
    return Check("preprocessing", found, expected, not wrong)
