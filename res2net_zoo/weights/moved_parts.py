"""Restore the names of a Res2Net's tensors after a project has moved its parts into other modules.

For example `nn.Sequential(*list(backbone.children())[:-2])`, whose tensors begin with 0., 1., 4. to 7., or a separate
module for each part: `layer0 = nn.Sequential(backbone.conv1, backbone.bn1)`, `encoder1 = backbone.layer1`.
"""

import re
from collections.abc import Sequence
from itertools import takewhile

import torch

BLOCK = re.compile(r"(?P<stage>(?:[^.]{1,100}\.){1,20}?)\d{1,3}\.convs\.\d{1,2}\.weight$")
MOST_STAGES = 64
NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
# Modules of the stems, in the order of their tensors: 7x7, and three 3x3.
STEMS = (["conv1", "bn1"], ["conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1"])


def named_as_res2net(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Rename every four consecutive stages and the stem before them, in the order of the tensors.

    Args:
        tensors: The tensors of a file.

    Returns:
        The tensors, in the same order; those of a Res2Net with its own names after the prefix that its stages share.
        None if the file has no such stages or too many, or a name would be used twice.
    """
    names = list(tensors)
    stages = list(dict.fromkeys(match["stage"] for name in names if (match := BLOCK.match(name))))
    if len(stages) > MOST_STAGES:
        return None
    renamed: dict[str, str] = {}
    for i in range(0, len(stages) - 3, 4):
        four = stages[i : i + 4]
        together = takewhile(
            lambda parts: len(set(parts)) == 1, zip(*(stage.split(".")[:-1] for stage in four), strict=False)
        )
        prefix = "".join(f"{parts[0]}." for parts in together)
        first = next(place for place, name in enumerate(names) if name.startswith(four[0]))
        renamed |= {name: prefix + own for name, own in stem_names(names[:first], tensors).items()}
        for number, stage in enumerate(four, 1):
            inside = [name for name in names if name.startswith(stage)]
            renamed |= {name: f"{prefix}layer{number}.{name.removeprefix(stage)}" for name in inside}
    moved = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    return moved if renamed and len(moved) == len(tensors) else None


def stem_names(before: Sequence[str], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the names of a stem's tensors, the last ones before the first stage, by their names in the file."""
    found: dict[str, str] = {}
    for modules in STEMS:
        own = [f"{module}.{leaf}" for module in modules for leaf in (NORM if is_norm(module) else ["weight"])]
        last = before[-len(own) :]
        kernels = [tensors[name].ndim == 4 for name in last]
        fits = [name.rpartition(".")[2] for name in last] == [name.rpartition(".")[2] for name in own]
        if fits and kernels == [not is_norm(name.rpartition(".")[0]) for name in own]:
            found = dict(zip(last, own, strict=True))
    return found


def is_norm(module: str) -> bool:
    """Return whether a module of a stem is a BatchNorm."""
    return module in ("bn1", "conv1.1", "conv1.4")
