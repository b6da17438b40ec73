"""Provenance of weights: the record from which cards, configs, exported files and publishing take licence and origin.

A model folder stores it in config.json under the key `provenance`, which timm ignores.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError, safe_open
from timm.models import parse_model_name

from res2net_zoo import catalog
from res2net_zoo.catalog import Checkpoint
from res2net_zoo.utils.card_metadata import read_card
from res2net_zoo.utils.console import printable, warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import read_json, sha256_of

KEY = "provenance"  # in config.json
ORIGINS = ("random", "checkpoint", "file", "unknown")
LONGEST = 500  # characters of a value

# Keys of timm's pretrained cfg that describe particular weights rather than preprocessing.
_CLAIMS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "license", "origin_url")
_OF_THE_CHECKPOINT = ("tag", "description", "paper_name", "notes")


def _is_text(value: str) -> bool:
    return bool(value.strip()) and value.isprintable() and len(value) <= LONGEST


def _is_repository(value: str) -> bool:
    return len(value) <= LONGEST and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", value))


def _is_hash(value: str) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{1,64}", value))


def _short(value: object) -> str:
    return repr(value[:60]) if isinstance(value, str) else f"of type {type(value).__name__}"


_WANTED: dict[str, tuple[Callable[[str], bool], str]] = {
    "base_model": (_is_repository, "a repository id ORG/NAME"),
    "repository": (_is_repository, "a repository id ORG/NAME"),
    "source_sha256": (_is_hash, "the hexadecimal digits of a SHA-256"),
}
_TEXT = (_is_text, f"1 to {LONGEST} printable characters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where weights come from.

    Attributes:
        origin: `random` for random initialization, `checkpoint` for a published checkpoint, `file` for a converted
            file that is not a release, `unknown` if there is no record.
        trained: Whether the weights were trained since.
        checkpoint: The checkpoint, as `arch.tag`.
        source: URL of the original file, or the name of a converted file.
        source_sha256: SHA-256 of that file, or its first digits if only these were published.
        repository: Hub repository with exactly these weights.
        base_model: Hub repository of weights that these derive from.
        start: The model that the last training started from.
        teacher: The teacher model of a distillation.
        license: The licence, as a Hub identifier.
        inherited_license: The licence of the first licensed weights that these derive from.

    Raises:
        InputError: A value is invalid.
    """

    origin: str
    trained: bool = False
    checkpoint: str | None = None
    source: str | None = None
    source_sha256: str | None = None
    repository: str | None = None
    base_model: str | None = None
    start: str | None = None
    teacher: str | None = None
    license: str | None = None
    inherited_license: str | None = None

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS:
            raise InputError(f"origin must be one of {', '.join(ORIGINS)}, not {_short(self.origin)}")
        if type(self.trained) is not bool:
            raise InputError(f"trained must be true or false, not {_short(self.trained)}")
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            accept, wanted = _WANTED.get(field.name, _TEXT)
            if value is not None and not (isinstance(value, str) and accept(value)):
                raise InputError(f"{field.name} must be {wanted}, not {_short(value)}")
        if self.origin == "random" and (self.checkpoint or self.source):
            raise InputError("weights of origin random have no checkpoint and no source")
        if self.origin == "checkpoint" and not self.checkpoint:
            raise InputError("weights of origin checkpoint need the checkpoint's name")

    @property
    def derives_from(self) -> str | None:
        """Hub repository of these weights or, if there is none, of those that they derive from."""
        return self.repository or self.base_model

    def after_training(self, start: str | None, license: str | None = None, teacher: str | None = None) -> "Provenance":
        """Return the record of weights trained from these.

        Args:
            start: The model that has these weights; None for random ones.
            license: The licence that the user chooses for the result; inherited if None.
            teacher: The teacher model of a distillation.

        Raises:
            InputError: A value is invalid.
        """
        return dataclasses.replace(
            self,
            trained=True,
            repository=None,
            base_model=self.derives_from,
            start=start,
            teacher=teacher or self.teacher,
            license=license or self.license,
            inherited_license=self.inherited_license or self.license,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the known values, for config.json."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    def applied_to(self, config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
        """Return a timm pretrained cfg in which the description of the weights is replaced by this record.

        Args:
            config: The cfg, which may describe published weights of the architecture.
            architecture: Its architecture. For those in the catalogue, paper ids refer to the architecture and
                are kept; for timm's others they refer to the weights.
        """
        dropped = list(_CLAIMS)
        if self.origin != "checkpoint" or self.trained:
            dropped += _OF_THE_CHECKPOINT
            if architecture not in catalog.load().architectures:
                dropped.append("paper_ids")
        stated = {"license": self.license}
        if self.source and self.source.startswith("https://"):
            stated["origin_url"] = self.source
        return {key: value for key, value in config.items() if key not in dropped} | {
            key: value for key, value in stated.items() if value
        }

    def __str__(self) -> str:
        """Return the record as text."""
        known = {
            "random": "random initialization",
            "checkpoint": f"the checkpoint {self.checkpoint}",
            "file": "a file that is not a release",
            "unknown": "unknown origin",
        }[self.origin]
        parts = [known + (f" ({self.source})" if self.source else "")]
        if self.trained:
            parts.append(f"trained from {self.start}" if self.start else "trained")
        parts += [f"teacher {self.teacher}"] if self.teacher else []
        parts += [f"base model {self.derives_from}"] if self.derives_from else []
        return ", ".join([*parts, f"licence {self.license or 'not stated'}"])


RANDOM = Provenance(origin="random")
UNKNOWN = Provenance(origin="unknown")


def of_converted(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> Provenance:
    """Return the record of a file that was converted as a checkpoint of the catalogue, released or not.

    Args:
        checkpoint: The checkpoint.
        metadata: Metadata of the converted file: source and source_sha256. A file without a hash, such as a
            mirror's copy from the Hub, is taken as the released one.
    """
    digest = metadata.get("source_sha256", "")
    if digest.startswith(checkpoint.sha256) or not digest:
        return of_checkpoint(checkpoint, metadata)
    source = printable(metadata.get("source", ""))[:LONGEST]
    return Provenance(origin="file", source=source or None, source_sha256=digest if _is_hash(digest) else None)


def of_checkpoint(checkpoint: Checkpoint, metadata: Mapping[str, str] | None = None) -> Provenance:
    """Return the record of a checkpoint of the catalogue.

    Args:
        checkpoint: The checkpoint.
        metadata: Metadata of its converted file, such as a source other than the release's URL.
    """
    stated = metadata or {}
    source, digest = printable(stated.get("source", ""))[:LONGEST], stated.get("source_sha256", "")
    return Provenance(
        origin="checkpoint",
        checkpoint=checkpoint.name,
        source=source or checkpoint.url or None,
        source_sha256=(digest if _is_hash(digest) else checkpoint.sha256) or None,
        repository=checkpoint.hub_id or None,
        base_model=checkpoint.base_model or None,
        license=checkpoint.license.lower(),
    )


def of_model(name: str, config: Mapping[str, Any], pretrained: bool = True) -> Provenance:
    """Return the record of the weights of a model from `pretrained.create_model`.

    Args:
        name: The name of the model.
        config: The model's pretrained_cfg.
        pretrained: Whether weights were loaded.

    Raises:
        InputError: The record in the model folder is invalid.
    """
    if not pretrained:
        return RANDOM
    source, identifier = parse_model_name(name)
    if source == "local-dir":
        return of_folder(Path(identifier))
    if source == "hf-hub":
        return of_repository(identifier)
    tag = config.get("tag")
    full = f"{config['architecture']}.{tag}" if tag else config["architecture"]
    if checkpoint := catalog.load().checkpoint(full):
        return of_converted(checkpoint, metadata_of(Path(config["file"])) if config.get("file") else {})
    license = config.get("license")  # one of timm's other models, whose cfg describes the loaded weights
    return Provenance(
        origin="checkpoint",
        checkpoint=full,
        source=config.get("origin_url") or config.get("url") or None,
        repository=(config.get("hf_hub_id") or "").partition("@")[0] or None,
        license=None if license in ("", "unknown") else license,
    )


def warn_of_other_license(before: Provenance, after: Provenance) -> None:
    """Warn if the licence differs from that of the weights they derive from."""
    if before.license and after.license != before.license:
        warn(
            f"the licence {after.license} replaces {before.license}, the licence of the weights that the training "
            "starts from; make sure that this is permitted"
        )


def shown(name: str) -> str:
    """Return a model's name for a record; of a folder only its name, without the path on this machine."""
    source, identifier = parse_model_name(name)
    return printable(Path(identifier).resolve().name if source == "local-dir" else identifier)[:LONGEST]


def of_repository(identifier: str) -> Provenance:
    """Return the record of a repository on the Hub, from its files in the cache or from the Hub.

    Args:
        identifier: `ORG/NAME`, or `ORG/NAME@REVISION`.

    Raises:
        InputError: Its record is invalid.
    """
    repository, _, revision = identifier.partition("@")

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except (EntryNotFoundError, HfHubHTTPError, OSError):
            return None

    config = fetch("config.json")
    fetch("README.md")
    record = of_folder(config.parent) if config else UNKNOWN
    known = next((c for c in catalog.load().checkpoints.values() if c.hub_id == repository), None)
    if known and record.origin == "unknown":
        return of_checkpoint(known)
    return dataclasses.replace(record, repository=repository)


def of_folder(folder: Path) -> Provenance:
    """Return the record of a model folder.

    A folder without a record, such as one saved by timm, is compared with the catalogue by the hash of its weights or
    of their original file. If that fails, the origin is unknown, and licence and base model are those of its card.

    Raises:
        InputError: The record is invalid.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    card = _card_of(folder)
    if isinstance(config, dict) and KEY in config:
        record = parse(config[KEY], path)
        # Without an inherited licence, the owner may add one to the card later.
        return dataclasses.replace(record, license=record.license or card["license"])
    return _released(folder / WEIGHTS) or Provenance(origin="unknown", **card)


def parse(record: Any, path: Path) -> Provenance:
    """Return a record that was read from a file.

    Args:
        record: Its values, as of `Provenance.to_dict`; unknown ones are ignored.
        path: The file, for messages.

    Raises:
        InputError: The record is invalid.
    """
    if not isinstance(record, dict):
        raise InputError(f"{path}: {KEY} must be an object, not {_short(record)}; correct it, or remove it")
    fields = {field.name for field in dataclasses.fields(Provenance)}
    try:
        return Provenance(**{"origin": None, **{key: value for key, value in record.items() if key in fields}})
    except InputError as error:
        raise InputError(f"{path}: {KEY}: {error}; correct it, or remove {KEY}") from error


def _released(weights: Path) -> Provenance | None:
    """Return the record of weights whose hash is that of a checkpoint in the catalogue."""
    checkpoints = catalog.load().checkpoints.values()
    metadata = metadata_of(weights)
    if digest := metadata.get("source_sha256"):
        for checkpoint in checkpoints:
            same = (
                digest.startswith(checkpoint.sha256) if checkpoint.sha256 else checkpoint.url == metadata.get("source")
            )
            if _is_hash(digest) and same:
                return of_converted(checkpoint, metadata)
        return None
    known = {checkpoint.hub_sha256: checkpoint for checkpoint in checkpoints if checkpoint.hub_sha256}
    if not known or not weights.is_file():
        return None
    found = known.get(sha256_of(weights))
    return of_checkpoint(found) if found else None


def _card_of(folder: Path) -> dict[str, Any]:
    """Return licence and base model of a folder's model card, None if missing or ambiguous."""
    try:
        data = read_card(folder / "README.md").data
        license, base_model = data.get("license"), data.get("base_model")
    except Exception:  # the card is missing, or huggingface_hub cannot parse its YAML
        license = base_model = None
    if isinstance(base_model, list) and len(base_model) == 1:
        base_model = base_model[0]
    return {
        "license": license if isinstance(license, str) and _is_text(license) and license != "unknown" else None,
        "base_model": base_model if isinstance(base_model, str) and _is_repository(base_model) else None,
    }


def metadata_of(weights: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if the file is missing or incomplete."""
    if not weights.is_file():
        return {}
    try:
        with safe_open(weights, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
