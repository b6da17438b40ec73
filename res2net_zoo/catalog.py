"""The catalogue of models and checkpoints in `catalog.toml`.

It is the single source of timm's pretrained cfgs, the tables of `res2net-zoo list`, the model cards, and the published
accuracies for validation.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

from res2net_zoo.utils.console import nearest
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import locked, read_text, write_atomically

INTERPOLATIONS = ("bilinear", "bicubic")
FORMATS = ("torch", "paddle", "mindspore", "mmengine", "mmdet", "holocron")

Record = TypeVar("Record")


class CatalogError(InputError, ValueError):
    """An invalid or missing field in the catalogue; the message names the entry and the field."""


def _check(accept: Callable[[Any], bool], wanted: str, **kwargs: Any) -> Any:
    def validate(value: Any) -> None:
        if not accept(value):
            raise ValueError(f"{value!r} is not {wanted}")

    return validated_field(validate, **kwargs)


def _shape(value: list[int]) -> bool:
    return len(value) == 3 and all(size > 0 for size in value)


def _channels(value: list[float]) -> bool:
    return len(value) > 0 and all(0 <= x <= 1 for x in value)


def _percent(value: float) -> bool:
    return 0 <= value <= 100


def _decimal(value: str) -> bool:
    return bool(re.fullmatch(r"(\d+(\.\d+)?)?", value))


def _arxiv(value: str) -> bool:
    return bool(re.fullmatch(r"arXiv:\d{4}\.\d{5}", value))


def _is_repository(value: str) -> bool:
    return bool(re.fullmatch(r"([\w.-]+/[\w.-]+)?", value))


def _filled(value: str) -> bool:
    return bool(value.strip())


@strict
@dataclass(kw_only=True)
class Accuracy:
    """One published accuracy of a checkpoint.

    Attributes:
        dataset: The dataset, such as `imagenet-1k`.
        split: The split of the dataset.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent.
        source: The publication.
    """

    dataset: str = _check(_filled, "a dataset's name")
    split: str = _check(_filled, "a split's name")
    top1: float = _check(_percent, "a percentage")
    top5: float = _check(_percent, "a percentage")
    source: str = _check(_filled, "a source")


@strict
@dataclass(kw_only=True)
class Downstream:
    """A published result of a larger model that contains a checkpoint, which is only its backbone.

    Attributes:
        model: The larger model.
        dataset: The dataset, such as `COCO`.
        figures: Metrics in percent, by their published names.
        source: The publication.
    """

    model: str = _check(_filled, "a model's name")
    dataset: str = _check(_filled, "a dataset's name")
    figures: dict[str, float] = _check(lambda x: bool(x) and all(map(_percent, x.values())), "figures up to 100")
    source: str = _check(_filled, "a source")

    @property
    def text(self) -> str:
        """The figures on one line."""
        return ", ".join(f"{name} {value:.1f}" for name, value in self.figures.items())


@strict
@dataclass(kw_only=True)
class Printed:
    """Figures of a model as printed in a publication, digit for digit; `""` if not printed.

    Attributes:
        parameters: Millions of parameters.
        gmacs: Billions of multiply-accumulates.
        runtime_ms: Milliseconds per image.
        top1_error: Top-1 error in percent, for models without a checkpoint.
        source: The publication.
    """

    parameters: str = _check(_decimal, "a number as printed", default="")
    gmacs: str = _check(_decimal, "a number as printed", default="")
    runtime_ms: str = _check(_decimal, "a number as printed", default="")
    top1_error: str = _check(_decimal, "a number as printed", default="")
    source: str = _check(_filled, "a source")


@strict
@dataclass(kw_only=True)
class Architecture:
    """One registered model.

    Attributes:
        name: Its name in timm's registry.
        title: A short description.
        parameters: Number of parameters with `num_classes` classes.
        macs: Multiply-accumulates of one image of `input_size`.
        input_size: (channels, height, width) of the default input.
        reduction: Stride of the last feature map.
        num_classes: Default number of classes.
        first_conv: Name of the first convolution, which timm adapts to other numbers of channels.
        papers: arXiv ids of its papers, in addition to the Res2Net paper.
        printed: Its figures in publications.
        difference: Why a printed size differs from the counted one; `""` if none differs.
        crop_pct: Share of the resized image that the centre crop keeps; None for timm's default.
        mean: Mean of each channel; None for timm's default.
        std: Standard deviation of each channel; None for timm's default.
    """

    name: str = _check(_filled, "a name")
    title: str = _check(_filled, "a title")
    parameters: int = _check(lambda n: n > 0, "a number of parameters")
    macs: int = _check(lambda n: n > 0, "a number of multiply-accumulates")
    input_size: list[int] = _check(_shape, "channels, height and width")
    reduction: int = _check(lambda n: n > 0, "a stride")
    num_classes: int = _check(lambda n: n > 0, "a number of classes")
    first_conv: str = _check(_filled, "a module's name")
    papers: list[str] = _check(lambda ids: all(map(_arxiv, ids)), "arXiv ids", default_factory=list)
    printed: tuple[Printed, ...] = ()
    difference: str = ""
    crop_pct: float | None = _check(lambda x: x is None or 0 < x <= 1, "a share in (0, 1]", default=None)
    mean: list[float] | None = _check(
        lambda x: x is None or _channels(x), "one value in [0, 1] per channel", default=None
    )
    std: list[float] | None = _check(
        lambda x: x is None or _channels(x), "one value in [0, 1] per channel", default=None
    )

    @property
    def misprinted(self) -> list[str]:
        """The printed sizes that differ from the counted ones, rounded to the same digits."""
        pairs = [(p.parameters, self.parameters / 1e6) for p in self.printed]
        pairs += [(p.gmacs, self.macs / 1e9) for p in self.printed]
        return [text for text, ours in pairs if text and f"{ours:.{len(text.partition('.')[2])}f}" != text]


@strict
@dataclass(kw_only=True)
class Checkpoint:
    """One released weight file.

    Attributes:
        architecture: Name of its architecture.
        tag: timm's pretrained tag, which distinguishes checkpoints of an architecture.
        released_by: The publisher.
        url: URL of the original file; `""` if it has no direct download.
        sha256: SHA-256 of the original file, or its first digits if only these were published; `""` if none.
        format: Format of the original file.
        hub_id: Hub repository that has it as safetensors; `""` if there is none.
        hub_sha256: SHA-256 of `model.safetensors` there; `""` if not recorded.
        base_model: Hub repository of the weights that it derives from; `""` if none.
        license: SPDX identifier of the licence that its release states.
        license_note: What the licence covers, if it may not cover the weights; `""` if it does.
        input_size: (channels, height, width) of the input for evaluation.
        crop_pct: Share of the resized image that the centre crop keeps.
        interpolation: Interpolation for resizing.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
        num_classes: Number of classes; 0 for a backbone without a classifier.
        notes: Remarks.
        accuracies: All published accuracies; the first of each dataset is used for comparisons.
        downstream: Published results of the larger models whose backbone it is.
    """

    architecture: str = _check(_filled, "an architecture's name")
    tag: str = _check(lambda tag: bool(re.fullmatch(r"[a-z0-9_]+", tag)), "a tag")
    released_by: str = _check(_filled, "a name")
    url: str = _check(lambda url: url == "" or url.startswith("https://"), "an https URL")
    sha256: str = _check(lambda text: bool(re.fullmatch(r"[0-9a-f]{0,64}", text)), "the start of a SHA-256")
    format: str = _check(FORMATS.__contains__, f"one of {', '.join(FORMATS)}")
    hub_id: str = _check(_is_repository, "a repository id ORG/NAME")
    hub_sha256: str = _check(lambda text: bool(re.fullmatch(r"([0-9a-f]{64})?", text)), "a SHA-256")
    base_model: str = _check(_is_repository, "a repository id ORG/NAME", default="")
    license: str = _check(_filled, "an SPDX identifier")
    license_note: str
    input_size: list[int] = _check(_shape, "channels, height and width")
    crop_pct: float = _check(lambda x: 0 < x <= 1, "a share in (0, 1]")
    interpolation: str = _check(INTERPOLATIONS.__contains__, f"one of {', '.join(INTERPOLATIONS)}")
    mean: list[float] = _check(_channels, "one value in [0, 1] per channel")
    std: list[float] = _check(_channels, "one value in [0, 1] per channel")
    num_classes: int = _check(lambda n: n >= 0, "a number of classes")
    notes: str
    accuracies: tuple[Accuracy, ...]
    downstream: tuple[Downstream, ...] = ()

    @property
    def name(self) -> str:
        """`architecture.tag`, the name for `timm.create_model`."""
        return f"{self.architecture}.{self.tag}"

    @property
    def imagenet_accuracy(self) -> Accuracy | None:
        """The first published accuracy on ImageNet-1k, if there is one."""
        return next((a for a in self.accuracies if a.dataset == "imagenet-1k"), None)


@strict
@dataclass(kw_only=True)
class Target:
    """A published result in a task beyond classification.

    Attributes:
        task: One of `res2net_zoo.tasks.TASKS`.
        head: One of the task's heads.
        model: The backbone; ResNets are included for comparison.
        data: The dataset, such as `COCO`.
        figures: The metrics, by the names that evaluations use.
        source: The publication.
    """

    task: str = _check(_filled, "a task")
    head: str = _check(_filled, "a head")
    model: str = _check(_filled, "a backbone's name")
    data: str = _check(_filled, "a dataset's name")
    figures: dict[str, float] = _check(lambda x: bool(x) and all(map(_percent, x.values())), "figures up to 100")
    source: str = _check(_filled, "a source")


@dataclass(frozen=True)
class Catalog:
    """The architectures and checkpoints by name, in the catalogue's order, the URLs of sources, and the targets."""

    architectures: dict[str, Architecture]
    checkpoints: dict[str, Checkpoint]
    sources: dict[str, str]
    targets: tuple[Target, ...] = ()

    def target(self, task: str, head: str, model: str, data: str) -> Target:
        """Return the published result for a task's model.

        Raises:
            InputError: There is none; the message lists the available ones.
        """
        of_head = [target for target in self.targets if (target.task, target.head) == (task, head)]
        for target in of_head:
            if (target.model, target.data) == (model, data):
                return target
        there = ", ".join(f"{target.model} on {target.data}" for target in of_head)
        raise InputError(f"no published result of {head} on {model} with {data}; available: {there or 'none'}")

    def entries(self) -> Iterator[tuple[Architecture, Checkpoint | None]]:
        """Yield every architecture with each of its checkpoints, or with None if it lacks weights."""
        for architecture in self.architectures.values():
            checkpoints = [c for c in self.checkpoints.values() if c.architecture == architecture.name]
            yield from ((architecture, checkpoint) for checkpoint in checkpoints)
            if not checkpoints:
                yield architecture, None

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Return the checkpoint called `arch.tag`, or the default one of `arch`, if there is one."""
        if "." in name:
            return self.checkpoints.get(name)
        return next((c for c in self.checkpoints.values() if c.architecture == name), None)

    def url_of(self, source: str) -> str | None:
        """Return the URL of an accuracy's source, from the catalogue's table `sources`."""
        return next((url for start, url in self.sources.items() if source.startswith(start)), None)


def _record(cls: type[Record], entry: str, fields: Mapping[str, Any]) -> Record:
    if not isinstance(fields, Mapping):
        raise CatalogError(f"catalogue entry {entry} is not a table of fields")
    try:
        return cls(**fields)
    except (TypeError, StrictDataclassError) as error:
        # Both messages name the field; the name of the dataclass and line breaks are removed.
        reason = " ".join(str(error).replace(f"{cls.__name__}.__init__()", "").split())
        raise CatalogError(f"catalogue entry {entry}: {reason}") from error


def parse(text: str) -> Catalog:
    """Read a catalogue.

    Args:
        text: TOML, as in `catalog.toml`.

    Returns:
        The catalogue.

    Raises:
        CatalogError: The text is not TOML, or a field is invalid or missing.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"the catalogue is not TOML: {error}") from error
    architectures: dict[str, Architecture] = {}
    for name, fields in data.get("architectures", {}).items():
        entry = f"architectures.{name}"
        printed = tuple(
            _record(Printed, f"{entry} printed {j}", row) for j, row in enumerate(fields.get("printed", []), 1)
        )
        architecture = _record(Architecture, entry, {**fields, "name": name, "printed": printed})
        if bool(architecture.misprinted) != bool(architecture.difference):
            raise CatalogError(
                f"catalogue entry {entry}: difference must be given if and only if printed sizes differ from "
                f"parameters and macs (differing: {', '.join(architecture.misprinted) or 'none'})"
            )
        architectures[name] = architecture
    checkpoints: dict[str, Checkpoint] = {}
    for i, fields in enumerate(data.get("checkpoints", []), start=1):
        entry = ".".join(filter(None, (fields.get("architecture"), fields.get("tag")))) or f"checkpoint {i}"
        rows: dict[str, Any] = {}
        for key, cls, what in (("accuracies", Accuracy, "accuracy"), ("downstream", Downstream, "downstream")):
            if key in fields:
                rows[key] = tuple(_record(cls, f"{entry} {what} {j}", row) for j, row in enumerate(fields[key], 1))
        checkpoint = _record(Checkpoint, entry, {**fields, **rows})
        if checkpoint.architecture not in architectures:
            raise CatalogError(f"catalogue entry {entry}: architecture {checkpoint.architecture!r} is not listed")
        if checkpoint.name in checkpoints:
            raise CatalogError(f"catalogue entry {entry}: tag {checkpoint.tag!r} is listed twice")
        if not len(checkpoint.mean) == len(checkpoint.std) == checkpoint.input_size[0]:
            raise CatalogError(
                f"catalogue entry {entry}: mean and std need one value for each of input_size's channels"
            )
        if checkpoint.accuracies and not checkpoint.num_classes:
            raise CatalogError(f"catalogue entry {entry}: accuracies need num_classes, which is 0")
        checkpoints[checkpoint.name] = checkpoint
    sources = data.get("sources", {})
    for checkpoint in checkpoints.values():
        figures: tuple[Accuracy | Downstream, ...] = (*checkpoint.accuracies, *checkpoint.downstream)
        for figure in figures:
            if not any(figure.source.startswith(start) for start in sources):
                raise CatalogError(
                    f"catalogue entry {checkpoint.name}: source {figure.source!r} does not start with a key of sources"
                )
    targets = tuple(_record(Target, f"target {i}", row) for i, row in enumerate(data.get("targets", []), 1))
    return Catalog(architectures, checkpoints, sources, targets)


def path() -> Path:
    """Return the path of the package's catalogue."""
    return Path(str(resources.files("res2net_zoo").joinpath("catalog.toml")))


@cache
def load() -> Catalog:
    """Read the package's catalogue; the result is cached.

    Raises:
        CatalogError: A field is invalid or missing.
        InputError: The file cannot be read.
    """
    text = read_text(path())
    try:
        return parse(text)
    except CatalogError as error:
        raise CatalogError(f"cannot read {path()}: {error}") from error


def record(name: str, **fields: str) -> None:
    """Update fields of a checkpoint in the package's catalogue, preserving the rest of the file.

    Args:
        name: `arch.tag`.
        **fields: The fields and their new values.

    Raises:
        CatalogError: A value is invalid; then nothing is written.
        InputError: The file cannot be written.
    """
    import tomlkit

    with locked(path(), wait=60):  # concurrent updates would overwrite each other
        _record_fields(tomlkit, name, fields)


def _record_fields(tomlkit: Any, name: str, fields: Mapping[str, str]) -> None:
    text = path().read_text(encoding="utf-8")
    document = tomlkit.parse(text)
    for entry in document["checkpoints"]:
        if f"{entry['architecture']}.{entry['tag']}" == name:
            entry.update(fields)
    new = tomlkit.dumps(document)
    if new != text:
        parse(new)
        try:
            write_atomically(path(), lambda file: file.write_text(new, encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot record {name} in {path()}: {error.strerror or error}") from error
        load.cache_clear()


def choose(names: Sequence[str] | None) -> list[Checkpoint]:
    """Return checkpoints by name.

    Args:
        names: Each `arch.tag`, or `arch` for its default; None for all.

    Raises:
        InputError: A checkpoint does not exist.
    """
    catalog = load()
    if names is None:
        return list(catalog.checkpoints.values())
    chosen: dict[str, Checkpoint] = {}
    for name in names:
        if (checkpoint := catalog.checkpoint(name)) is None:
            raise InputError(f"the catalogue has no checkpoint {name}; {nearest(name, list(catalog.checkpoints))}")
        chosen[checkpoint.name] = checkpoint
    return list(chosen.values())


def pretrained_cfgs() -> dict[str, Any]:
    """Return timm's pretrained cfg of every checkpoint, and of architectures without checkpoints.

    Returns:
        Cfgs by `arch.tag` or `arch`, for `timm.models.generate_default_cfgs`.
    """
    catalog = load()
    cfgs: dict[str, dict[str, Any]] = {}
    for c in catalog.checkpoints.values():
        cfgs[c.name] = {
            "hf_hub_id": c.hub_id or None,
            # timm needs a URL to know that there are weights, but never downloads from it, which would
            # unpickle the file: models/_builder.py loads the converted weights instead.
            "url": "" if c.hub_id else c.url,
            "origin_url": c.url,
            "license": c.license.lower(),
            "input_size": tuple(c.input_size),
            "crop_pct": c.crop_pct,
            "interpolation": c.interpolation,
            "mean": tuple(c.mean),
            "std": tuple(c.std),
            "num_classes": c.num_classes,
            **_architecture_cfg(catalog.architectures[c.architecture], c.input_size),
        }
    for a in catalog.architectures.values():
        if catalog.checkpoint(a.name) is None:
            cfgs[a.name] = {
                "input_size": tuple(a.input_size),
                "interpolation": "bilinear",
                "num_classes": a.num_classes,
                **({"crop_pct": a.crop_pct} if a.crop_pct else {}),
                **({"mean": tuple(a.mean)} if a.mean else {}),
                **({"std": tuple(a.std)} if a.std else {}),
                **_architecture_cfg(a, a.input_size),
            }
    return cfgs


def _architecture_cfg(architecture: Architecture, input_size: list[int]) -> dict[str, Any]:
    return {
        "pool_size": tuple(size // architecture.reduction for size in input_size[1:]),
        "first_conv": architecture.first_conv,
        "classifier": "fc",
        "paper_ids": ["arXiv:1904.01169", *architecture.papers] if architecture.papers else "arXiv:1904.01169",
    }
