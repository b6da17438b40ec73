"""Whether a model folder is what it says it is: hashes, a strict load, preprocessing, fingerprint.

A folder of a task's model (`tasks`) has no fingerprint; it is loaded, and its backbone is compared.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from safetensors import SafetensorError
from safetensors.torch import load_file

from res2net_zoo import catalog
from res2net_zoo.catalog import Checkpoint
from res2net_zoo.utils import card_metadata
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import open_regular, read_json, sha256_of
from res2net_zoo.weights import fingerprint, model_config
from res2net_zoo.weights.convert import explain
from res2net_zoo.weights.model_config import ModelConfig
from res2net_zoo.weights.provenance import metadata_of, of_folder

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


def verify(folder: Path, wanted: Checkpoint | None = None) -> list[Check]:
    """Check a model folder against the catalogue and against its own fingerprint.

    Args:
        folder: The folder.
        wanted: Which of the catalogue's checkpoints it must be; None for what it says of itself.

    Returns:
        What was looked at, in order; where the weights cannot be loaded nothing comes after that.

    Raises:
        InputError: It is no model folder.
    """
    if is_of_task(folder):
        return _verify_task(folder)
    config, name = read_config(folder)
    cfg = config.pretrained_cfg
    checkpoint = wanted or identify(folder)
    weights = folder / WEIGHTS
    stored = fingerprint.read(folder)
    digest = sha256_of(weights)
    checks = [_compare(f"SHA-256 of {WEIGHTS}", digest, stored.sha256 if stored else "", "fingerprint.json")]
    if checkpoint and checkpoint.hub_sha256:
        checks.append(_compare(f"SHA-256 of {WEIGHTS}", digest, checkpoint.hub_sha256, "the catalogue"))
    if wanted:
        checks.append(Check("name", name, wanted.name, name == wanted.name))
    model_config.build_on_meta(config)  # a config that makes no model is no fault of the weights
    every = "every tensor once, and no other"
    try:
        model_config.check_weights(config, weights)
        with torch.random.fork_rng(devices=[]):  # a model is made with random weights first
            model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
        tensors = load_file(weights)
        model.load_state_dict(tensors, strict=True)
    except (InputError, SafetensorError, RuntimeError, OSError) as error:
        return [*checks, Check("strict load", explain(error), every, False)]
    if checkpoint:
        source = metadata_of(weights).get("source_sha256", "")
        known = checkpoint.sha256 if source else ""
        row = _compare("SHA-256 of the original", source or "not said", known, "the release")
        # Of some the release gives the first digits alone.
        checks.append(row._replace(passed=source.startswith(known)) if known else row)
    checks.append(Check("strict load", f"{len(tensors)} tensors", every, True))
    checks += [_values(tensors), _origin(folder)]
    if checkpoint:
        checks.append(_preprocessing(cfg, checkpoint))
    checks += _card(folder)
    if not stored:
        return [*checks, Check("logits", "-", "no fingerprint.json", None)]
    try:
        apart = fingerprint.difference(fingerprint.logits(model, stored.input_size), stored.logits)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / fingerprint.NAME} does not fit the model: {one_line(error)}") from error
    found = "nothing like them" if math.isinf(apart) else f"{apart:.1e} from the stored ones"
    checks.append(Check("logits", found, f"within {fingerprint.TOLERANCE:.0e}", apart <= fingerprint.TOLERANCE))
    return checks


def is_of_task(folder: Path) -> bool:
    """Return whether a folder is of a model for a task beyond classification."""
    try:
        return isinstance(read_json(folder / "config.json")["task"], str)
    except (InputError, KeyError, TypeError):
        return False


def _verify_task(folder: Path) -> list[Check]:
    from res2net_zoo import tasks

    every = "every tensor once, and no other"
    try:
        model = tasks.load(str(folder))
        network = model.state_dict()
    except InputError as error:
        return [Check("strict load", str(error), every, False)]
    try:
        with open_regular(folder / "backbone" / WEIGHTS):
            backbone = load_file(folder / "backbone" / WEIGHTS)
    except (InputError, SafetensorError, OSError) as error:
        return [Check("backbone", one_line(error), "the network's", False)]
    features = model.features.state_dict()
    same = features.keys() == backbone.keys() and all(torch.equal(features[key], backbone[key]) for key in features)
    return [
        Check(f"SHA-256 of {WEIGHTS}", sha256_of(folder / WEIGHTS), "not said", None),
        Check("strict load", f"{len(network)} tensors", every, True),
        _values(network),
        _origin(folder),
        *_card(folder),
        Check("backbone", "the network's" if same else "another", "the network's", same),
    ]


def _origin(folder: Path) -> Check:
    return Check("provenance", str(of_folder(folder)), "-", None)


def _values(tensors: dict[str, torch.Tensor]) -> Check:
    odd = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    return Check("values", f"not finite in {odd[0]}" if odd else "finite", "finite", not odd)


def _card(folder: Path) -> list[Check]:
    """Check that a folder's README.md is a model card: it begins with metadata, such as the licence.

    Returns:
        What there is to say of it; nothing where it is a card with a licence.
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
    """Read a model folder's card.

    Raises:
        InputError: It is missing, or no model card that can be read.
    """
    path = folder / "README.md"
    try:
        card = card_metadata.read_card(path)
        if not card.data.to_dict():
            raise ValueError("it does not begin with metadata between two lines of ---")
    except Exception as error:
        # Whatever huggingface_hub's parser of YAML stumbles over.
        raise InputError(f"{path} is no model card: {one_line(error)}") from error
    return card


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """Return a model folder's config, checked, and the `arch.tag` that it gives itself.

    Raises:
        InputError: The config cannot be loaded, or there are no weights.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no model folder: there is no such folder")
    try:
        config = model_config.read(folder / model_config.NAME)
    except InputError as error:
        raise InputError(f"{folder} is no model folder: {error}") from error
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}, so it is no model folder")
    return config, f"{config.architecture}.{config.pretrained_cfg.get('tag')}"


def identify(folder: Path) -> Checkpoint | None:
    """Return which of the catalogue's checkpoints a model folder is, if any.

    Its name alone does not tell: what timm saves after fine-tuning keeps the tag. What was
    converted here says so in its weights, whatever its config says.

    Raises:
        InputError: It is no model folder.
    """
    if is_of_task(folder):
        return None
    _, name = read_config(folder)
    checkpoints, said = catalog.load().checkpoints, metadata_of(folder / WEIGHTS)
    if not said.get("source_sha256"):
        return None
    same = [c for c in checkpoints.values() if c.sha256 and said["source_sha256"].startswith(c.sha256)]
    same += [c for c in checkpoints.values() if c.url and c.url == said.get("source")]
    return checkpoints.get(name) or (same[0] if same else None)


def _compare(what: str, found: str, expected: str, by: str) -> Check:
    if not expected:
        return Check(what, found, f"not said by {by}", None)
    return Check(what, found, f"{expected} ({by})", found == expected)


def _preprocessing(config: dict[str, Any], checkpoint: Checkpoint) -> Check:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple | list) else value

    wrong = [key for key in PREPROCESSING if plain(config.get(key)) != plain(getattr(checkpoint, key))]
    found = ", ".join(f"{key} {plain(config.get(key))}" for key in wrong) or "the same"
    expected = ", ".join(f"{key} {plain(getattr(checkpoint, key))}" for key in wrong) or "the catalogue's"
    return Check("preprocessing", found, expected, not wrong)
