"""The bill of materials of a model folder, bom.cdx.json: what the model is, what it consists of and where it is from.

It is a CycloneDX ML-BOM (https://cyclonedx.org/capabilities/mlbom/), derived from the folder's other files and the
catalogue alone, without time stamps or random identifiers, so that the same folder always has the same bytes.
"""

import importlib.metadata
import json
import os
import re
import sys
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import CardData, EvalResult
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

from res2net_zoo import catalog
from res2net_zoo.catalog import Checkpoint
from res2net_zoo.utils import card_metadata
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import read_json, sha256_of, write_atomically
from res2net_zoo.weights import fingerprint, signature
from res2net_zoo.weights.checks import Check
from res2net_zoo.weights.provenance import Provenance, of_folder

if TYPE_CHECKING:
    from cyclonedx.model import ExternalReference
    from cyclonedx.model.component import Component

NAME = "bom.cdx.json"
LARGEST = 4 * 2**20  # bytes of a bill
LARGEST_FILE = 16 * 2**30  # bytes of a file whose hash is compared
ESSENTIAL = (WEIGHTS, "config.json")  # the files that determine what the model computes
LIBRARIES = ("torch", "timm")
PAPER = "1904.01169"


class Facts(NamedTuple):
    """What the folder's files and the catalogue state about a model.

    Attributes:
        config: Content of config.json.
        card: Metadata of the model card; None if it cannot be read.
        origin: Provenance of the weights.
        checkpoint: The catalogue's checkpoint if these are its weights.
        architecture: Name of the architecture; of a task's model that of its backbone.
    """

    config: dict[str, Any]
    card: CardData | None
    origin: Provenance
    checkpoint: Checkpoint | None
    architecture: str


def write(folder: Path, name: str | None = None) -> None:
    """Write the bill of materials of a model folder, atomically.

    Args:
        folder: The folder, with its other files.
        name: The model's name if it is not a checkpoint of the catalogue; by default the folder's.

    Raises:
        InputError: A file of the folder is invalid.
    """
    text = _text(folder, name or folder.resolve().name)
    write_atomically(folder / NAME, lambda path: path.write_text(text))


def update(folder: Path) -> None:
    """Write the bill of materials again, after other files were written; a folder without one stays without."""
    if (folder / NAME).exists():
        write(folder)


def renew(folder: Path, since: Collection[str] | None = None) -> None:
    """Write the bill of materials again if it is stale, see `is_stale`."""
    if is_stale(folder, since):
        write(folder)


def is_stale(folder: Path, since: Collection[str] | None = None) -> bool:
    """Return whether the bill of materials is missing, or other files than weights and config have changed since.

    Args:
        folder: The folder.
        since: The files whose changes matter; None for all.

    Raises:
        InputError: It is invalid, or lists other weights or another config.
    """
    result = check(folder)
    if result.passed is False:
        raise InputError(f"{folder / NAME} does not describe the folder: {result.found}; remove it to write a new one")
    changes = {NAME} if not (folder / NAME).exists() else {*_changes(folder), *_unlisted(folder)}
    return bool(changes if since is None else changes & {NAME, *since})


def check(folder: Path) -> Check:
    """Compare a folder with its bill of materials.

    The check fails if the bill is invalid, or if weights or config differ. It is undecided if the bill is missing, or
    if other files, such as the card, have changed since.

    Args:
        folder: The folder.
    """
    what, expected = "bill of materials", "the SHA-256 of every file in it"
    if not os.path.lexists(folder / NAME):
        return Check(what, f"no {NAME}", "-", None)
    try:
        changes = _changes(folder)
    except InputError as error:
        return Check(what, one_line(error), "a CycloneDX bill of materials", False)
    if not changes:
        return Check(what, "the files that it lists", expected, True)
    wrong = [name for name in changes if PurePosixPath(name).name in ESSENTIAL]
    first = min(wrong or changes)
    more = f", and {len(changes) - 1} other files" if len(changes) > 1 else ""
    return Check(what, f"{printable(first)[:100]} {changes[first]}{more}", expected, False if wrong else None)


def _changes(folder: Path) -> dict[str, str]:
    """Return how files differ from what the bill lists, by name.

    Raises:
        InputError: It is not a bill of materials.
    """
    listed = _listed(read_json(folder / NAME, LARGEST))
    changes = {name: change for name, digest in listed.items() if (change := _change(folder, name, digest))}
    return changes | {name: "is not listed" for name in ESSENTIAL if name not in listed}


def _unlisted(folder: Path) -> set[str]:
    """Return the files that were added to a folder after its bill was written.

    Raises:
        InputError: It is not a bill of materials.
    """
    if not (folder / NAME).exists():
        return set()
    return {part.name for part in _files(folder)} - _listed(read_json(folder / NAME, LARGEST)).keys()


def _listed(document: Any) -> dict[str, str]:
    """Return the SHA-256 of every file that a bill lists.

    The schema is not checked: the time of checking a long URL grows with the cube of its length.

    Raises:
        InputError: It is not a bill, its components are malformed, or a name leads out of the folder.
    """
    if not isinstance(document, dict) or document.get("bomFormat") != "CycloneDX":
        raise InputError(f"{NAME} is not a CycloneDX bill of materials")
    try:
        files = [part for part in document.get("components", []) if part["type"] == "file"]
        listed = {part["name"]: {h["alg"]: h["content"] for h in part.get("hashes", [])}["SHA-256"] for part in files}
        for name in listed:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\0" in name:
                raise InputError(f"{NAME} lists a file outside of the folder")
        return {name: str(digest).lower() for name, digest in listed.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{NAME} lists a file without a name or its SHA-256") from error


def _change(folder: Path, name: str, digest: str) -> str:
    """Return how a file differs from what is listed, "" if it does not."""
    if not os.path.lexists(folder / name):
        return "is missing"
    try:
        if (size := (folder / name).stat().st_size) > LARGEST_FILE:
            return f"has {size:,} bytes, more than the limit of {LARGEST_FILE:,}"
        return "" if sha256_of(folder / name) == digest else "differs"
    except (InputError, OSError):
        return "cannot be read"


def _text(folder: Path, name: str) -> str:
    from cyclonedx.model.bom import Bom
    from cyclonedx.output.json import JsonV1Dot6

    facts = _facts_of(folder)
    files, datasets = _files(folder), _datasets(facts)
    libraries = [_library(name, version) for name, version in sorted(_versions(folder).items())]
    model = _model(facts, name, {part.name: part for part in files})
    bom = Bom(components=[*files, *datasets, *libraries])
    bom.metadata.component = model
    bom.metadata.tools.components.add(_tool())
    bom.register_dependency(model, [*files, *datasets, *libraries])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    # The library does not support model cards yet.
    document["metadata"]["component"]["modelCard"] = _model_card(facts, [f"data:{part.name}" for part in datasets])
    del document["metadata"]["timestamp"], document["serialNumber"]
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True)).urn
    first = ("$schema", "bomFormat", "specVersion", "serialNumber", "version", "metadata")
    return json.dumps({key: document[key] for key in first} | document, indent=2) + "\n"


def _facts_of(folder: Path) -> Facts:
    config, origin = read_json(folder / "config.json"), of_folder(folder)
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} is not the config of a model")
    card: CardData | None
    try:
        card = card_metadata.read_card(folder / "README.md").data
    except Exception:  # the card is missing, or huggingface_hub cannot parse its YAML
        card = None
    published = origin.origin == "checkpoint" and not origin.trained
    checkpoint = catalog.load().checkpoints.get(origin.checkpoint or "") if published else None
    architecture = config.get("model" if "task" in config else "architecture", "")
    return Facts(config, card, origin, checkpoint, printable(architecture))


def _files(folder: Path) -> "list[Component]":
    """Return the folder's files, without hidden ones, bills and signatures."""
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = [
        name
        for name, path in sorted(paths.items())
        if path.name not in (NAME, signature.NAME)
        and not any(part.startswith(".") and part != ".eval_results" for part in PurePosixPath(name).parts)
    ]
    return [
        Component(
            type=ComponentType.FILE,
            name=name,
            bom_ref=f"file:{name}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256_of(paths[name]))],
        )
        for name in names
    ]


def _datasets(facts: Facts) -> "list[Component]":
    """Return the datasets that the card names, with what they were used for."""
    from cyclonedx.model.component import Component, ComponentType

    if facts.card is None:
        return []
    stated = facts.card.get("datasets")
    training = [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]
    results = [] if facts.checkpoint else [result.dataset_name for result in _results(facts.card)]
    # Both splits of a training run are of the same dataset.
    other = "training and evaluation" if facts.origin.trained else "evaluation"
    uses = {printable(name): other for name in results} | {printable(name): "training" for name in training}
    return [
        Component(
            type=ComponentType.DATA,
            name=name,
            bom_ref=f"data:{name}",
            description=f"data of {use}",
            external_references=_references([(f"https://huggingface.co/datasets/{name}", "on the Hub", "")])
            if name in training and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
            else [],
        )
        for name, use in sorted(uses.items())
    ]


def _versions(folder: Path) -> dict[str, str]:
    """Return the versions of the libraries that wrote the folder: the recorded ones, or else the installed ones."""
    for path in (folder / fingerprint.NAME, folder / NAME):
        try:
            content = read_json(path, max(LARGEST, fingerprint.LARGEST))
            parts = [part for part in content.get("components", []) if part["type"] == "library"]
            known = content.get("made_with") or {part["name"]: part["version"] for part in parts}
            if known:
                return {
                    name: printable(version)[:50]
                    for name, version in known.items()
                    if re.fullmatch(r"[\w.-]{1,50}", name)
                }
        except (InputError, AttributeError, KeyError, TypeError):
            continue
    return {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES}


def _library(name: str, version: str) -> "Component":
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    ref = f"library:{name}"
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=ref,
        purl=PackageURL("pypi", None, name, version),
    )


def _tool() -> "Component":
    from cyclonedx.model.component import Component, ComponentType

    version = sys.modules["res2net_zoo"].__version__  # importing it here would be a circular import
    return Component(type=ComponentType.APPLICATION, name="res2net-zoo", version=version, bom_ref="tool:res2net-zoo")


def _model(facts: Facts, name: str, files: "Mapping[str, Component]") -> "Component":
    """Return the component of the model, without its model card."""
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    checkpoint, architecture = facts.checkpoint, catalog.load().architectures.get(facts.architecture)
    parents = facts.origin.derives_from if facts.origin.trained else facts.origin.base_model
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=checkpoint.name if checkpoint else printable(name),
        bom_ref="model",
        description=architecture.title if architecture else None,
        publisher=checkpoint.released_by if checkpoint else None,
        hashes=files[WEIGHTS].hashes if WEIGHTS in files else [],
        licenses=[_license(facts.origin.license)],
        external_references=_references(_sources(facts)),
        pedigree=Pedigree(ancestors=[_base_model(parents)]) if parents else None,
        properties=[
            Property(name=f"res2net-zoo:{key}", value=str(value)) for key, value in _properties(facts).items() if value
        ],
    )


def _license(stated: str | None) -> Any:
    """Return the licence as stated, by its SPDX identifier if it has one."""
    from cyclonedx.model.license import DisjunctiveLicense, LicenseAcknowledgement
    from cyclonedx.spdx import fixup_id

    declared = LicenseAcknowledgement.DECLARED
    if stated and (identifier := fixup_id(stated)):
        return DisjunctiveLicense(id=identifier, acknowledgement=declared)
    return DisjunctiveLicense(name=stated or "unknown", acknowledgement=declared if stated else None)


def _base_model(repository: str) -> "Component":
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    owner, _, name = repository.partition("/")
    purl = PackageURL("huggingface", owner, name)
    kind = ComponentType.MACHINE_LEARNING_MODEL
    return Component(type=kind, name=repository, bom_ref=f"base:{repository}", purl=purl)


def _sources(facts: Facts) -> list[tuple[str, str, str]]:
    """Return URL, comment and SHA-256 of where the weights are from, and the URLs of the papers."""
    origin, architecture = facts.origin, catalog.load().architectures.get(facts.architecture)
    found = []
    if origin.source and re.fullmatch(r"https?://[!-~]+", origin.source):
        digest = origin.source_sha256 or ""
        found.append((origin.source, "original file", digest if len(digest) == 64 else ""))
    if origin.repository:
        found.append((f"https://huggingface.co/{origin.repository}", "the same weights on the Hub", ""))
    if architecture:
        papers = dict.fromkeys([PAPER, *(paper.removeprefix("arXiv:") for paper in architecture.papers)])
        found += [(f"https://arxiv.org/abs/{paper}", "paper", "") for paper in papers]
    return found


def _references(sources: Iterable[tuple[str, str, str]]) -> "list[ExternalReference]":
    from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri

    kinds = {"paper": ExternalReferenceType.DOCUMENTATION}
    return [
        ExternalReference(
            type=kinds.get(comment, ExternalReferenceType.DISTRIBUTION),
            url=XsUri(url),
            comment=comment,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)] if digest else [],
        )
        for url, comment, digest in sources
    ]


def _properties(facts: Facts) -> dict[str, Any]:
    """Return what CycloneDX lacks fields for."""
    origin, checkpoint = facts.origin, facts.checkpoint
    return {
        "origin": origin.origin,
        "trained": "true" if origin.trained else "",
        "checkpoint": origin.checkpoint,
        "source": origin.source,
        "source-sha256": origin.source_sha256,
        "start": origin.start,
        "teacher": origin.teacher,
        "inherited-license": origin.inherited_license,
        "license-note": checkpoint.license_note if checkpoint else "",
        "head": facts.config.get("head") if "task" in facts.config else "",
    }


def _model_card(facts: Facts, datasets: list[str]) -> dict[str, Any]:
    """Return CycloneDX's model card: task, architecture, datasets and figures."""
    config = facts.config
    stated = facts.card.get("pipeline_tag") if facts.card else None
    task = "image-classification" if config.get("num_classes") else "image-feature-extraction"
    parameters: dict[str, Any] = {
        "task": printable(stated or config.get("task") or task),
        "architectureFamily": "convolutional neural network",
        "modelArchitecture": facts.architecture,
        "datasets": [{"ref": ref} for ref in datasets],
        "inputs": [{"format": "image"}],
    }
    metrics = [{"type": kind, "value": f"{value}", "slice": where} for kind, value, where in _figures(facts)]
    return {"modelParameters": parameters} | (
        {"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}
    )


def _figures(facts: Facts) -> list[tuple[str, Any, str]]:
    """Return name, value, and data with source of every figure: the published ones, or else those of the card."""
    checkpoint = facts.checkpoint
    if checkpoint is None:
        by = "measured by res2net-zoo" if facts.origin.trained else "as its model card states"
        return [
            (
                printable(r.metric_name or r.metric_type),
                printable(r.metric_value),
                printable(_slice(r.dataset_name, r.dataset_split, by)),
            )
            for r in _results(facts.card)
        ]
    found: list[tuple[str, Any, str]] = []
    for accuracy in checkpoint.accuracies:
        where = _slice(accuracy.dataset, accuracy.split, _published(accuracy.source))
        found += [("Top-1 accuracy", accuracy.top1, where), ("Top-5 accuracy", accuracy.top5, where)]
    for result in checkpoint.downstream:
        where = _slice(result.dataset, None, _published(result.source))
        found += [(f"{name} of {result.model}", value, where) for name, value in result.figures.items()]
    return found


def _results(card: CardData | None) -> list[EvalResult]:
    """Return the evaluation results on a card, which may have other values under their name."""
    found = card.get("eval_results") if card else None
    return [result for result in found if isinstance(result, EvalResult)] if isinstance(found, list) else []


def _slice(dataset: str, split: str | None, source: str) -> str:
    return f"{dataset}{f' {split}' if split else ''}; {source}"


def _published(source: str) -> str:
    url = catalog.load().url_of(source)
    return f"published: {source}{f' <{url}>' if url else ''}"
