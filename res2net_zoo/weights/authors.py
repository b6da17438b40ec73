"""Weights under the keys of the authors' code, in a `.pth` file that their code loads without changes.

Their models have the keys and shapes of the zoo's, so only two things need care: the layers must compute what theirs
compute, and their DLA has projections that it never uses.
"""

import io
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from timm.layers import DropPath
from timm.models import get_arch_name, get_model_args
from torch import nn

from res2net_zoo import catalog
from res2net_zoo.utils.console import nearest, warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import write_atomically
from res2net_zoo.weights.convert import UNREAD_BY_DLA
from res2net_zoo.weights.model_names import parse_name

# The functions of the authors' files res2net_v1b.py, res2net.py, res2next.py and dla.py, and what they build.
ARCHITECTURES = {
    "res2net50_v1b": "res2net50d",
    "res2net50_v1b_26w_4s": "res2net50d",
    "res2net101_v1b": "res2net101d",
    "res2net101_v1b_26w_4s": "res2net101d",
    "res2net152_v1b_26w_4s": "res2net152d",
    "res2net50": "res2net50_26w_4s",
    "res2net50_26w_4s": "res2net50_26w_4s",
    "res2net50_26w_6s": "res2net50_26w_6s",
    "res2net50_26w_8s": "res2net50_26w_8s",
    "res2net50_48w_2s": "res2net50_48w_2s",
    "res2net50_14w_8s": "res2net50_14w_8s",
    "res2net101_26w_4s": "res2net101_26w_4s",
    "res2next50": "res2next50",
    "res2net_dla60": "dla60_res2net",
    "res2next_dla60": "dla60_res2next",
}


def zoo_name(name: str) -> str:
    """Return the zoo's name of a model, which may be given by the authors' name.

    Args:
        name: The authors' name, or a name as for `timm.create_model`.

    Raises:
        InputError: The name is unknown, or the authors' code has no such model.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if parse_name(name)[0] is None:
        architecture = get_arch_name(name)
        if not timm.is_model(architecture):
            raise InputError(f"there is no model {name}; {nearest(name, [*ARCHITECTURES, *ARCHITECTURES.values()])}")
        _check_architecture(name, architecture)
    return name


def _check_architecture(name: str, architecture: str) -> None:
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(dict.fromkeys(ARCHITECTURES.values()))
        what = name if name.split(".")[0] == architecture else f"{name}, a {architecture},"
        raise InputError(f"{what} is not a model of the authors' code, which has {known}")


def original_file_name(name: str) -> str:
    """Return the file name of a model's original weights, such as `res2net50_v1b_26w_4s-3cf99910.pth`.

    Args:
        name: A name as for `timm.create_model`.

    Returns:
        The name in the URL of the catalogue. For other weights, the model's name or its folder's with `.pth`.
    """
    checkpoint = catalog.load().checkpoint(name)
    if checkpoint and checkpoint.format == "torch" and checkpoint.url:
        return PurePosixPath(urlsplit(checkpoint.url).path).name
    source, identifier = parse_name(name)
    return f"{Path(identifier).resolve().name if source == 'local-dir' else identifier.replace('/', '_')}.pth"


def authors_state_dict(model: nn.Module, name: str) -> OrderedDict[str, torch.Tensor]:
    """Return a model's weights under the keys of the authors' code, which loads them strictly.

    A model without a classifier results in a state dict without one, which their code loads with `strict=False`.

    Args:
        model: A model from `timm.create_model`.
        name: Its name, for error messages.

    Raises:
        InputError: The authors' code has no such model, or would compute something else with its weights.
    """
    built: Any = model
    architecture = built.pretrained_cfg["architecture"]
    _check_architecture(name, architecture)
    if dilation := _dilation(get_model_args(model)):
        warn(
            f"{name} is dilated: {dilation}; only copies of the authors' code that dilate in this way compute the same"
        )
    with torch.device("meta"):
        theirs = _layers(timm.create_model(architecture, num_classes=built.num_classes, **dilation))
    ours = _layers(model)
    for layer in [*theirs, *ours]:
        if ours.get(layer) != theirs.get(layer):
            raise InputError(
                f"the authors' code cannot compute {name}: its {layer} is {ours.get(layer, 'missing')}, and "
                f"{theirs.get(layer, 'missing')} in the authors' {architecture}"
            )
    state = OrderedDict((key, tensor.detach().cpu().contiguous()) for key, tensor in model.state_dict().items())
    if architecture.startswith("dla"):
        state.update(_unread_projections(model))
    return state


def save_state_dict(state: OrderedDict[str, torch.Tensor], path: Path) -> None:
    """Write a state dict as torch's zip format, atomically; the same tensors give the same bytes.

    Args:
        state: The state dict.
        path: The file; an existing one is replaced.

    Raises:
        InputError: The file cannot be written.
    """
    content = io.BytesIO()  # a path would become part of the content
    torch.save(state, content)
    try:
        write_atomically(path, lambda new: new.write_bytes(content.getbuffer()))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _dilation(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model that dilate it as copies of the authors' code do, which timm's rule does not."""
    keys = {"strides", "dilations", "multi_grid"}
    if arguments.get("dilation_rule") == "mmdet":
        keys |= {"output_stride", "dilation_rule"}
    return {key: value for key, value in arguments.items() if key in keys}


def _layers(model: nn.Module) -> dict[str, str]:
    """Return the description of each layer that affects a model's output in eval mode."""
    without_effect = (nn.Identity, nn.Dropout, DropPath)
    return {
        name: repr(layer)
        for name, layer in model.named_modules()
        if not any(True for _ in layer.children()) and not isinstance(layer, without_effect)
    }


def _unread_projections(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return tensors for the projections of nested trees in the authors' DLA, whose outputs are never used."""
    state = {}
    for prefix in UNREAD_BY_DLA:
        tree: Any = model.get_submodule(prefix.removesuffix(".project."))
        while tree.levels > 1:
            tree = tree.tree1
        for key, tensor in tree.project.state_dict().items():
            fill = torch.ones_like if key in ("1.weight", "1.running_var") else torch.zeros_like
            state[prefix + key] = fill(tensor, device="cpu")
    return state
