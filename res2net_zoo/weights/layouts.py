"""Weights under the keys of OpenMMLab: the inverse of `weights.convert`. `weights.authors` has the authors' keys."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.backbone import wiring_of

# The layouts, and the wiring that the code of each computes.
LAYOUTS = {"mmpretrain": "official", "mmdet": "mmdet"}


def to_layout(state: Mapping[str, torch.Tensor], layout: str) -> "OrderedDict[str, torch.Tensor]":
    """Rename the weights of a Res2Net for other code; `weights.convert` reads them back, bit for bit.

    Args:
        state: State dict of a zoo model of the ResNet kind.
        layout: Whose keys:

            - `mmdet`: those of MMDetection's backbone `Res2Net`, for its `init_cfg=dict(type="Pretrained", ...)`. The
              deep stem is `stem.0` to `stem.7`, and there is no classifier.
            - `mmpretrain`: those of an image classifier of MMPretrain, `backbone.*` and `head.fc.*`.

    Returns:
        The same tensors, contiguous and on the CPU, in the same order.

    Raises:
        InputError: The layout is unknown, or its code has no such model.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown keys {layout}; choose {', '.join(LAYOUTS)}")
    check_resnet(state, layout)
    deep, renamed = "conv1.0.weight" in state, OrderedDict()
    for name, tensor in state.items():
        is_classifier = name.startswith("fc.")
        if layout == "mmpretrain" or not is_classifier:
            own = rename_stem(name, deep, layout)
            prefix = "" if layout == "mmdet" else "head." if is_classifier else "backbone."
            renamed[prefix + own] = tensor.detach().cpu().contiguous()
    return renamed


def check_resnet(state: Mapping[str, torch.Tensor], layout: str) -> None:
    """Check that a state dict is one of a Res2Net with four stages, without attention and cardinality.

    Raises:
        InputError: It is one of another model.
    """
    plain = r"(conv1|bn1|fc|layer[1-4]\.\d+\.(conv1|bn1|convs\.\d+|bns\.\d+|conv3|bn3|downsample\.\d))\.(\d\.)?\w+"
    others = [name for name in state if not re.fullmatch(plain, name)]
    others += [name for name, tensor in state.items() if ".convs." in name and tensor.shape[0] != tensor.shape[1]]
    if others or not any(name.startswith("layer4.") for name in state):
        raise InputError(
            f"{layout} has only Res2Nets of four stages, without attention and cardinality"
            f"{f'; it has no model with {others[0]} {tuple(state[others[0]].shape)}' if others else ''}"
        )


def rename_stem(name: str, deep: bool, layout: str) -> str:
    """Return MMDetection's or MMPretrain's name for a tensor of timm, without a prefix.

    Args:
        name: timm's name.
        deep: Whether the model has a deep stem, which only then has another name.
        layout: `mmdet`, which counts its layers as timm does, or `mmpretrain`, which counts its convolutions.
    """
    module, _, rest = name.partition(".")
    if not deep or module not in ("conv1", "bn1"):
        return name
    index, leaf = rest.split(".") if module == "conv1" else ("7", rest)
    number, part = divmod(int(index), 3)
    return f"stem.{number}.{('conv', 'bn')[part]}.{leaf}" if layout == "mmpretrain" else f"stem.{index}.{leaf}"


def wiring_doubt(model: nn.Module, layout: str) -> str:
    """Return why the code of a layout computes a different output than a model with its weights; `""` if it does not.

    Args:
        model: A zoo model of the ResNet kind.
        layout: The layout.
    """
    built: Any = model
    wiring = wiring_of(built.layer1[0])
    if wiring == LAYOUTS[layout]:
        return ""
    return (
        f"the weights have the wiring {wiring}, and {layout}'s code computes the wiring {LAYOUTS[layout]}: they load "
        "into it, but its outputs differ until it is fine-tuned"
    )
