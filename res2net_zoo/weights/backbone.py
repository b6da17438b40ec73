"""Find the one Res2Net in a checkpoint: of a detector, a segmenter, or a training run.

The file's tensors are grouped by the prefix under which the blocks of a Res2Net are found. Those under each prefix are
compared with the tensors of every registered model, by name and shape. Names of files and containers have no influence.
"""

import re
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from res2net_zoo import catalog
from res2net_zoo.utils.console import nearest, printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import open_regular
from res2net_zoo.weights import torch_file
from res2net_zoo.weights.convert import (
    RENAMERS,
    UNREAD_BY_DLA,
    Tensors,
    check_file,
    fit,
    listed,
    read_mindspore,
    read_paddle,
    readable_errors,
    short,
    timm_names,
)
from res2net_zoo.weights.moved_parts import named_as_res2net
from res2net_zoo.weights.pickles import FormatError, StandIn

LONGEST = 500  # characters of a tensor's name
MOST_PREFIXES = 32
MOST_TENSORS = 100_000  # of a file; a training run of res2net200 has 8,000

# Names in a Res2Net's blocks after a prefix: of a ResNet or Big-Little Net, a DLA, PaddleClas's, Holocron's.
BLOCK = re.compile(
    r"(?P<prefix>(?:.*?\.)??)(?:layer\d\.(?:big\.|little\.)?(?:\d{1,3}\.){1,2}(?:convs|bns)\.\d+\."
    r"|level\d\.(?:tree\d\.)+(?:convs|bns)\.\d+\."
    r"|bb_\d+_\d+\.res\w+_branch2b_\d+\."
    r"|features\.\d{1,3}\.\d{1,3}\.conv\.3\.conv\.\d+\.)"
)
RESNET_BLOCK = re.compile(r"(?P<prefix>(?:.*?\.)??)layer\d\.\d{1,3}\.conv2\.weight$")

# Formats whose names only one wiring's code writes.
IMPLIED = {
    "mmdet": ("mmdet", "its keys stem.N are MMDetection's"),
    "mmengine": ("official", "its keys stem.N.conv are MMPretrain's"),
    "paddle": ("paddle", "its keys are PaddleClas's"),
    "mindspore": ("official", "its keys are MindCV's"),
    "holocron": ("official", "its keys are Holocron's"),
}


class Backbone(NamedTuple):
    """A Res2Net that was found in a checkpoint.

    Attributes:
        prefix: The prefix of its tensors in the file, with the names of containers; `""` at the top level.
        architecture: The registered model of its shape.
        model_args: Further arguments of the model: a wiring that no registered model of this shape has, or the channels
            of its images if they are not 3.
        wiring: Its wiring.
        reason: How the wiring is known.
        num_classes: Classes of its classifier; 0 without one.
        state: Its state dict, by timm's names.
        left_out: Names of the file's other tensors.
        contradiction: Why the chosen wiring may be wrong; `""` if nothing in the file contradicts it.
    """

    prefix: str
    architecture: str
    model_args: dict[str, Any]
    wiring: str
    reason: str
    num_classes: int
    state: Tensors
    left_out: list[str]
    contradiction: str = ""


class Known(NamedTuple):
    """What the tensors of a registered model look like, or of one with another kind of shortcut.

    Attributes:
        architecture: Its registered name.
        model_args: Its further arguments.
        shapes: The shape of each tensor, without the classifier and BatchNorm's counters.
        wiring: Its wiring; None if only one wiring of this kind of model exists.
        num_features: Channels of the last feature map.
    """

    architecture: str
    model_args: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    wiring: str | None
    num_features: int


class Misfit(NamedTuple):
    """How the tensors under a prefix differ from those of a model, a key of `known_models()`."""

    model: str
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def total(self) -> int:
        """Number of tensors that differ."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)


class Candidate(NamedTuple):
    """Tensors under one prefix.

    Attributes:
        prefix: The prefix.
        format: The format whose names they have.
        shapes: Their shapes, by the names after the prefix.
        misfits: Comparison with each registered model, the most similar one first.
    """

    prefix: str
    format: str
    shapes: dict[str, tuple[int, ...]]
    misfits: list[Misfit]

    def names(self, target: Container[str]) -> dict[str, str]:
        """Return the names in the file of the tensors that a model has, by the model's names."""
        named = timm_names(self.shapes, self.format, target)
        return {key: self.prefix + name for name, key in named.items() if key in target}

    def __str__(self) -> str:
        """Return stage depths, widths and stem, for a message."""
        rename = RENAMERS[self.format]
        return describe({rename(name): shape for name, shape in self.shapes.items()})


# ------------------------------------------------------------------------------------------ reading


def read(path: Path) -> Tensors:
    """Read all tensors of a checkpoint of any program; its content determines the format.

    Args:
        path: A file of PyTorch, safetensors, PaddlePaddle or MindSpore.

    Returns:
        The tensors, by names that begin with those of the containers: `state_dict.backbone.conv1.weight`.

    Raises:
        FormatError: The file is damaged, of another format, or would run code.
        InputError: The file cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(16)
    if head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\x0a")):  # torch's format, and that before version 1.6
        content = torch_file.load(path, stand_ins=True)
    elif head[8:9] == b"{":
        content = load_file(path)
    elif head.startswith(b"\x80"):
        content = read_paddle(path)
    elif head.startswith(b"\x0a"):
        content = read_mindspore(path)
    else:
        raise FormatError("it is not a weight file of PyTorch, safetensors, PaddlePaddle or MindSpore")
    tensors: Tensors = {}
    for name, tensor in flatten(content):
        if name in tensors:
            raise FormatError(f"its entry {short(name)} appears twice")
        tensors[name] = tensor
        if len(tensors) > MOST_TENSORS:
            raise FormatError(f"it has more tensors than the limit of {MOST_TENSORS:,}")
    return tensors


def flatten(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested containers, or in a module that was pickled whole, with its joined name."""
    if isinstance(content, StandIn) and isinstance(content.state, dict):
        parts = [content.state.get(part) for part in ("_parameters", "_buffers", "_modules")]
        content = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from flatten(value, f"{name}.{key}" if name else str(key))


# ---------------------------------------------------------------------------------------- comparing


@cache
def known_models() -> dict[str, Known]:
    """Return what the tensors of every registered model look like, by its name and further arguments."""
    known = {}
    for name in catalog.load().architectures:
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=0)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        shapes = {key: shape for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}
        is_resnet = timm.model_entrypoint(name).__module__.endswith(".res2net")
        known[name] = Known(name, {}, shapes, wiring_of(model.layer1[0]) if is_resnet else None, model.num_features)
        if is_resnet:
            # Other combinations of stem and shortcut exist, as with MMDetection's options.
            shift = -1 if (has_pool := "layer1.0.downsample.2.weight" in shapes) else 1
            other = {shifted(key, shift): shape for key, shape in shapes.items()}
            label, model_args = f"{name} with avg_down={not has_pool}", {"avg_down": not has_pool}
            known[label] = known[name]._replace(model_args=model_args, shapes=other)
    return known


def shifted(key: str, shift: int) -> str:
    """Return the name of a tensor after moving the layers of a shortcut by `shift` places."""
    return re.sub(r"(?<=\.downsample\.)\d", lambda match: str(int(match[0]) + shift), key)


def wiring_of(first: Any) -> str:
    """Return the wiring of a ResNet, given the first block of its first stage, which differs in all of them."""
    if first.hierarchical:
        return "paddle"
    return "official" if isinstance(first.pool, nn.AvgPool2d) else "mmdet"


def format_of(names: Iterable[str]) -> str:
    """Return the format whose names the tensors of a Res2Net have, a key of `RENAMERS`."""
    text = "\n".join(names)
    for format, pattern in {
        "paddle": r"^bb_\d",
        "holocron": r"^features\.\d+\.\d+\.conv\.3\.conv\.",
        "mindspore": r"\.moving_(mean|variance)$",
        "mmengine": r"^stem\.\d\.(conv|bn)\.",
        "mmdet": r"^stem\.[367]\.weight$",
    }.items():
        if re.search(pattern, text, re.MULTILINE):
            return format
    return "torch"


def compare(shapes: Mapping[str, tuple[int, ...]], format: str, model: str) -> Misfit:
    """Compare tensors with those of a known model, ignoring tensors outside of the model's own modules."""
    target = known_models()[model].shapes
    inside, first = {key.partition(".")[0] for key in target}, next(iter(target))
    found, unexpected, misshapen = set(), [], []
    for name, key in timm_names(shapes, format, target).items():
        if key in found:
            unexpected.append(name)
        elif key in target:
            found.add(key)
            if shapes[name] != target[key] and not (key == first and differs_in_channels(shapes[name], target[key])):
                label = short(name) if name == key else f"{short(name)} (in the model {key})"
                misshapen.append(f"{label} has shape {shapes[name]} in the file and {target[key]} in the model")
        elif key.endswith("num_batches_tracked") or key.startswith(UNREAD_BY_DLA):
            continue
        elif key.partition(".")[0] in inside or re.match(r"layer\d\.\d+\.", key):
            unexpected.append(name)
    return Misfit(model, [key for key in target if key not in found], unexpected, misshapen)


def differs_in_channels(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether a first convolution differs only in the channels of its images."""
    return len(shape) == 4 and shape[1] > 0 and (shape[0], *shape[2:]) == (expected[0], *expected[2:])


def find_prefixes(tensors: Iterable[str]) -> list[str]:
    """Return the prefixes under which blocks of a Res2Net are found.

    Raises:
        FormatError: There are too many of them.
    """
    prefixes = list({m["prefix"]: None for name in tensors if len(name) <= LONGEST and (m := BLOCK.match(name))})
    if len(prefixes) > MOST_PREFIXES:
        raise FormatError(f"it has blocks of Res2Nets under {len(prefixes):,} prefixes; the limit is {MOST_PREFIXES}")
    return prefixes


def named_by(prefix: str, prefixes: Sequence[str]) -> list[str]:
    """Return the prefixes in a file that a prefix means, in full or without the names of containers."""
    exact = [other for other in prefixes if other == with_dot(prefix)]
    return exact or [other for other in prefixes if prefix and other.endswith(f".{with_dot(prefix)}")]


def compare_all(tensors: Tensors, prefix: str, architecture: str | None = None) -> Candidate:
    """Compare the tensors under a prefix with those of registered models.

    Args:
        tensors: The tensors of a file.
        prefix: The prefix.
        architecture: The only model to compare with; default all.
    """
    shapes = {name[len(prefix) :]: tuple(t.shape) for name, t in tensors.items() if name.startswith(prefix)}
    format = format_of(shapes)
    names = [name for name, known in known_models().items() if architecture in (None, known.architecture)]
    misfits = sorted((compare(shapes, format, name) for name in names), key=lambda misfit: misfit.total)
    return Candidate(prefix, format, shapes, misfits)


def with_dot(prefix: str) -> str:
    """Return a prefix with a dot at the end, unless it is empty."""
    return f"{prefix.rstrip('.')}." if prefix else ""


# ---------------------------------------------------------------------------------------- deciding


def find(path: Path, prefix: str | None = None, wiring: str | None = None, architecture: str | None = None) -> Backbone:
    """Find the one complete Res2Net in a checkpoint.

    Args:
        path: The file.
        prefix: The prefix of the tensors to take; default the only one under which a complete Res2Net is found.
        wiring: The wiring of the weights; default the one that the names of the tensors imply.
        architecture: The registered model that it must be, whose wiring then counts as chosen; default any.

    Returns:
        The backbone.

    Raises:
        InputError: The file cannot be read, contains no Res2Net, several, or only a part of one, its shapes match no
            registered model, or its wiring is unknown.
    """
    with readable_errors(path, "weight"):
        check_file(path)
        tensors = read(path)
        try:
            candidate = choose(path, tensors, prefix, architecture)
        except InputError:
            if (moved := named_as_res2net(tensors)) is None or not has_complete(moved, prefix, architecture):
                raise
            tensors = moved
            candidate = choose(path, tensors, prefix, architecture)
        same = [misfit.model for misfit in candidate.misfits if not misfit.total]
        name, model_args, wiring, reason = choose_wiring(path, candidate, same, wiring, architecture)
        first = next(iter(known_models()[name].shapes))
        if (in_chans := tensors[candidate.names({first})[first]].shape[1]) != 3:
            model_args = {**model_args, "in_chans": in_chans}
        classifier = find_classifier(tensors, candidate, known_models()[name].num_features)
        num_classes = len(tensors[classifier["fc.bias"]]) if classifier else 0
        with torch.device("meta"):
            target = timm.create_model(name, num_classes=num_classes, **model_args).state_dict()
        origin = {key: full for key, full in candidate.names(target).items() if not key.startswith("fc.")} | classifier
        state = fit({key: tensors[full] for key, full in origin.items()}, candidate.format, target)
    used = set(origin.values())
    left_out = [name for name in tensors if name not in used]
    implied, why = IMPLIED.get(candidate.format, (wiring, ""))
    doubt = "" if implied == wiring else f"the wiring is {wiring}, {reason}, but {why}, whose wiring is {implied}"
    return Backbone(candidate.prefix, name, model_args, wiring, reason, num_classes, state, left_out, doubt)


def choose(path: Path, tensors: Tensors, prefix: str | None, architecture: str | None) -> Candidate:
    """Return the one complete Res2Net of a file.

    Raises:
        InputError: There is none, or there are several.
    """
    prefixes = find_prefixes(tensors)
    if not prefixes:
        raise InputError(f"{path} has no Res2Net: {what_else(tensors)}", "checkpoint")
    chosen = prefixes if prefix is None else named_by(prefix, prefixes)
    if not chosen:
        there = " and ".join(map(under, prefixes))
        raise InputError(f"{path} has no Res2Net {under(with_dot(prefix or ''))}; there is one {there}", "prefix")
    found = [compare_all(tensors, name, architecture) for name in chosen]
    complete = [candidate for candidate in found if not candidate.misfits[0].total]
    complete = [c for i, c in enumerate(complete) if not any(is_copy(tensors, c, other) for other in complete[:i])]
    if len(complete) > 1:
        there = " and ".join(f"{under(c.prefix)} ({c.misfits[0].model}: {c})" for c in complete)
        raise InputError(f"{path} has {len(complete)} complete Res2Nets: {there}; name the prefix of one", "prefix")
    if not complete:
        closest = min(found, key=lambda candidate: candidate.misfits[0].total)
        others = [under(candidate.prefix) for candidate in found if candidate is not closest]
        also = f"; there are parts of others {' and '.join(others)}" if others else ""
        message, parameters = explain_misfit(closest, architecture)
        raise InputError(f"{path}: {message}{also}", *parameters)
    return complete[0]


def has_complete(tensors: Tensors, prefix: str | None, architecture: str | None) -> bool:
    """Return whether a complete Res2Net is under a prefix, or under any if it is None."""
    prefixes = find_prefixes(tensors)
    chosen = prefixes if prefix is None else named_by(prefix, prefixes)
    return any(not compare_all(tensors, name, architecture).misfits[0].total for name in chosen)


def is_copy(tensors: Tensors, ours: Candidate, theirs: Candidate) -> bool:
    """Return whether two prefixes have the same tensors of a Res2Net, such as a module under two names."""
    target = known_models()[ours.misfits[0].model].shapes
    names, others = ours.names(target), theirs.names(target)
    return all(key in others and torch.equal(tensors[full], tensors[others[key]]) for key, full in names.items())


def choose_wiring(
    path: Path, candidate: Candidate, same: Sequence[str], wiring: str | None, architecture: str | None
) -> tuple[str, dict[str, Any], str, str]:
    """Return the model of a shape and a wiring.

    Args:
        path: The file, for messages.
        candidate: The tensors.
        same: The known models of this shape.
        wiring: The chosen wiring, if any.
        architecture: The chosen model, if any.

    Returns:
        The model's name, its further arguments, its wiring, and how the wiring is known.

    Raises:
        InputError: The wiring is not known, or the chosen model has another one.
    """
    first, others = known_models()[same[0]], known_models().values()
    if first.wiring is None:
        if wiring not in (None, "official"):
            raise InputError(f"{same[0]} has only the official wiring, not {wiring}", "wiring")
        return first.architecture, {}, "official", "the only one of this kind of model"
    if wiring:
        reason = "as chosen"
    elif architecture:
        wiring, reason = str(first.wiring), f"that of {architecture}"
    elif candidate.format in IMPLIED:
        wiring, reason = IMPLIED[candidate.format]
    else:
        raise InputError(
            f"{path}: the Res2Net {under(candidate.prefix)} has the shapes of {same[0]}, but the file does not show "
            "which wiring it was trained with, and the weights load into all of them: name official (the authors' "
            "code, timm, MMPretrain), paddle (PaddleClas) or mmdet (MMDetection, MMSegmentation)",
            "wiring",
        )
    fitting = [known for known in others if known.shapes == first.shapes and known.wiring == wiring]
    if architecture and fitting and architecture not in [known.architecture for known in fitting]:
        raise InputError(
            f"{architecture} has the wiring {first.wiring}; with the wiring {wiring} it is {fitting[0].architecture}",
            "model",
            "wiring",
        )
    if fitting:
        return architecture or fitting[0].architecture, fitting[0].model_args, wiring, reason
    return first.architecture, {**first.model_args, "block_args": {"wiring": wiring}}, wiring, reason


def find_classifier(tensors: Tensors, candidate: Candidate, num_features: int) -> dict[str, str]:
    """Return the names in the file of a linear classifier on a backbone's features, by timm's names; empty without one.

    It can have any number of classes. MMPretrain's is outside of the backbone, the only layer under `head.`.
    """
    prefix, rename = candidate.prefix, RENAMERS[candidate.format]
    names = {key: prefix + name for name in candidate.shapes if (key := rename(name)) in ("fc.weight", "fc.bias")}
    head = f"{prefix.removesuffix('backbone.')}head."
    if not names and prefix.endswith("backbone."):
        beside = {name.removeprefix(head): name for name in tensors if name.startswith(head)}
        names = beside if beside.keys() == {"fc.weight", "fc.bias"} else {}
    if names.keys() != {"fc.weight", "fc.bias"}:
        return {}
    weight, bias = (tensors[names[key]] for key in ("fc.weight", "fc.bias"))
    if weight.ndim not in (2, 4) or bias.ndim != 1:
        return {}
    inputs = weight.shape[0 if candidate.format == "paddle" else 1]  # Paddle stores a linear layer transposed
    return names if inputs == num_features else {}


# ---------------------------------------------------------------------------------------- explaining


def under(prefix: str) -> str:
    """Return where the tensors of a prefix are, for a message."""
    return f"under the prefix {printable(prefix)[-200:]}" if prefix else "at the top level, without a prefix"


def what_else(tensors: Tensors) -> str:
    """Return what a file without a Res2Net contains instead, for a message."""
    for name in tensors:
        if len(name) <= LONGEST and (match := RESNET_BLOCK.match(name)):
            prefix = match["prefix"]
            own = {key.removeprefix(prefix): tuple(t.shape) for key, t in tensors.items() if key.startswith(prefix)}
            return (
                f"{under(prefix)} it has a ResNet of {describe(own)}; a Res2Net has layer1.0.convs.0 in place of "
                "layer1.0.conv2; name a file with one"
            )
    if not tensors:
        return "it has no tensors"
    first = list(dict.fromkeys(f"{short(name.partition('.')[0])}" for name in tensors))
    return (
        f"its {len(tensors)} tensors are under {', '.join(first[:8])}{' and more' if len(first) > 8 else ''}, and "
        "none has the name of a block, such as layer1.0.convs.0.weight"
    )


def describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return stage depths, widths and stem of a network with the names of a ResNet, for a message."""
    stages: dict[int, set[int]] = {}
    for key in shapes:
        if match := re.match(r"layer(\d)\.(\d{1,3})\.", key):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    if not stages:
        return "the form of a DLA" if any(key.startswith("level") for key in shapes) else "no stages"
    numbers = sorted(stages)
    convs = [
        shapes.get(f"layer{i}.{min(stages[i])}.convs.0.weight") or shapes.get(f"layer{i}.{min(stages[i])}.conv2.weight")
        for i in numbers
    ]
    parts = [f"stage depths {'-'.join(str(len(stages[i])) for i in numbers)}"]
    parts.append(f"widths {'-'.join(str(shape[0]) if shape else '?' for shape in convs)}")
    wide = shapes.get(f"layer{numbers[0]}.{min(stages[numbers[0]])}.conv1.weight")
    if wide and (conv := convs[0]) and len(conv) == 4 and all(conv) and wide[0] % conv[0] == 0 and wide[0] > conv[0]:
        parts.append(f"scale {wide[0] // conv[0]}")
        parts.append(f"cardinality {conv[0] // conv[1]}")
    size = shapes.get("conv1.weight", ())[2:]
    stem = "a deep stem" if "conv1.0.weight" in shapes else f"a {'x'.join(map(str, size))} stem" if size else "no stem"
    return f"{', '.join(parts)} and {stem}"


def explain_misfit(candidate: Candidate, architecture: str | None) -> tuple[str, Sequence[str]]:
    """Return why no registered model fits, and the parameters that may help.

    A part of a model lacks tensors. A model of another shape has fewer or more blocks, or many other shapes.

    Args:
        candidate: The tensors; no registered model fits.
        architecture: The chosen model, if any.
    """
    # A model that the file contains in part is a better match than one that differs in fewer tensors.
    parts = [misfit for misfit in candidate.misfits if not misfit.unexpected and not misfit.misshapen]
    misfit = (parts or candidate.misfits)[0]
    target = known_models()[misfit.model].shapes
    where, wrong = f"the Res2Net {under(candidate.prefix)}", len(misfit.unexpected) + len(misfit.misshapen)
    if not wrong and (architecture or not lacks_only_last_blocks(misfit.missing, target)):
        return (
            f"{where} is not complete: it has {candidate} and lacks {len(misfit.missing)} of the {len(target)} tensors "
            f"of {misfit.model}: {listed(grouped(misfit.missing, target))}; name a file or a prefix with all",
            ["checkpoint", "prefix"],
        )
    if architecture or (wrong and (misfit.total <= len(target) // 10 or str(candidate) == describe(target))):
        problems = [*misfit.misshapen, *(f"{short(name)} is not in the model" for name in misfit.unexpected)]
        problems += [f"{name} of the model is missing" for name in grouped(misfit.missing, target)]
        return f"{misfit.total} tensors of {where} do not fit {misfit.model}: {listed(problems)}", []
    return (
        f"{where} has the shape of no registered model: it has {candidate}; the nearest is "
        f"{misfit.model}, which has {describe(target)}; name the prefix of another backbone, or a model to list "
        "the tensors that differ",
        ["prefix", "model"],
    )


def lacks_only_last_blocks(missing: Sequence[str], target: Iterable[str]) -> bool:
    """Return whether only whole blocks at the ends of stages are missing, so that the stages are shorter."""
    blocks = [match[0] for name in missing if (match := re.match(r"layer\d\.[1-9]\d{0,2}\.", name))]
    whole = [name for name in target if name.startswith(tuple(set(blocks)))]
    return bool(blocks) and set(missing) == set(whole)


def grouped(missing: Sequence[str], target: Iterable[str]) -> list[str]:
    """Return the names of missing tensors, with one line for each child of the model that is missing altogether."""
    tops = Counter(name.partition(".")[0] for name in target)
    lost = Counter(name.partition(".")[0] for name in missing)
    names: dict[str, None] = {}
    for name in missing:
        top = name.partition(".")[0]
        names[f"all of {top}" if lost[top] == tops[top] > 1 else name] = None
    return list(names)


def group_by_prefix(names: Iterable[str], prefix: str) -> dict[str, list[str]]:
    """Group the names of omitted tensors by their first component that differs from the backbone's prefix.

    Args:
        names: The names.
        prefix: The backbone's prefix: under `model.backbone.`, there are groups `model.neck.` and `optimizer.`.
    """
    path = prefix.split(".")[:-1]
    groups: dict[str, list[str]] = {}
    for name in names:
        parts, depth = name.split("."), 0
        while depth < min(len(path), len(parts) - 1) and parts[depth] == path[depth]:
            depth += 1
        groups.setdefault(".".join(parts[: depth + 1]) + "." * (len(parts) > depth + 1), []).append(name)
    return groups


def check_architecture(name: str) -> str:
    """Return the registered model that a name means, without its tag; the authors' names are accepted as well.

    Raises:
        InputError: There is none; suggests similar names.
    """
    architectures = list(catalog.load().architectures)
    architecture = name.partition(".")[0]
    if architecture not in architectures and timm.is_model(architecture):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm warns that the authors' names are deprecated
            model: Any = timm.create_model(architecture)
        architecture = model.pretrained_cfg["architecture"]
    if architecture not in architectures:
        raise InputError(f"the catalogue has no model {name}; {nearest(name, architectures)}", "model")
    return architecture
