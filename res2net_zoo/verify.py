"""Whether a model folder is what it says it is: hashes, a strict load, preprocessing, fingerprint."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from res2net_zoo import catalog, fingerprint
from res2net_zoo.catalog import Checkpoint
from res2net_zoo.hub import one_line
from res2net_zoo.program import WEIGHTS, InputError, sha256_of

PREPROCESSING = ("input_size", "crop_pct", "interpolation", "mean", "std")


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        what: What it is.
        found: What was found.
        expected: What it should be.
        passed: Whether it is; None where nobody has said what it should be.
    """

    what: str
    found: str
    expected: str
    passed: bool | None


def verify(folder: Path) -> list[Check]:
    """Check a model folder against the catalogue and against its own fingerprint.

    Args:
        folder: The folder.

    Returns:
        What was looked at, in order; where the weights cannot be loaded nothing comes after that.

    Raises:
        InputError: It is no model folder.
    """
    config, checkpoint = identify(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{folder} has no {WEIGHTS}, so it is no model folder")
    try:
        stored = json.loads((folder / fingerprint.NAME).read_text())
        said, size, theirs = stored["sha256"][WEIGHTS], tuple(stored["input_size"]), list(stored["logits"])
    except FileNotFoundError:
        said, size, theirs = "", (), []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / fingerprint.NAME} is no fingerprint: {one_line(error)}") from error
    digest = sha256_of(weights)
    checks = [_compare(f"SHA-256 of {WEIGHTS}", digest, said, "fingerprint.json")]
    if checkpoint and checkpoint.hub_sha256:
        checks.append(_compare(f"SHA-256 of {WEIGHTS}", digest, checkpoint.hub_sha256, "the catalogue"))
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:
        # A config that timm cannot build; it has no one type for it.
        raise InputError(f"{folder / 'config.json'} makes no model: {one_line(error)}") from error
    every = "every tensor once, and no other"
    try:
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(weights)
        model.load_state_dict(tensors, strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        return [*checks, Check("strict load", one_line(error), every, False)]
    if checkpoint:
        source = metadata.get("source_sha256", "")
        known = checkpoint.sha256 if source else ""
        checks.append(_compare("SHA-256 of the original", source or "not said", known, "the release"))
    checks.append(Check("strict load", f"{len(tensors)} tensors", every, True))
    odd = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    checks.append(Check("values", f"not finite in {odd[0]}" if odd else "finite", "finite", not odd))
    if checkpoint:
        checks.append(_preprocessing(config, checkpoint))
    if not theirs:
        return [*checks, Check("logits", "-", "no fingerprint.json", None)]
    try:
        apart = fingerprint.difference(fingerprint.logits(model, size), theirs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / fingerprint.NAME} does not fit the model: {one_line(error)}") from error
    found = "nothing like them" if math.isinf(apart) else f"{apart:.1e} from the stored ones"
    checks.append(Check("logits", found, f"within {fingerprint.TOLERANCE:.0e}", apart <= fingerprint.TOLERANCE))
    return checks


def identify(folder: Path) -> tuple[dict[str, Any], Checkpoint | None]:
    """Return a model folder's config, and which of the catalogue's checkpoints it says it is, if any.

    Raises:
        InputError: There is no config that can be read.
    """
    try:
        content = json.loads((folder / "config.json").read_text())
        config = dict(content.get("pretrained_cfg", content))  # older ones have it all on one level
        name = f"{content['architecture']}.{config.get('tag')}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "there is no such folder" if not folder.is_dir() else one_line(error)
        raise InputError(f"{folder} is no model folder: {what}") from error
    return config, catalog.load().checkpoints.get(name)


def _compare(what: str, found: str, expected: str, by: str) -> Check:
    if not expected:
        return Check(what, found, f"not said by {by}", None)
    return Check(what, found, f"{expected} ({by})", found.startswith(expected))


def _preprocessing(config: dict[str, Any], checkpoint: Checkpoint) -> Check:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple | list) else value

    wrong = [key for key in PREPROCESSING if plain(config.get(key)) != plain(getattr(checkpoint, key))]
    found = ", ".join(f"{key} {plain(config.get(key))}" for key in wrong) or "the same"
    expected = ", ".join(f"{key} {plain(getattr(checkpoint, key))}" for key in wrong) or "the catalogue's"
    return Check("preprocessing", found, expected, not wrong)
