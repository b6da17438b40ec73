"""Class activation maps: the evidence for a class in an image (paper, Section 4.5 and Figure 4).

Maps are computed by the grad-cam package, by default with Grad-CAM (Selvaraju et al., arXiv 1610.02391), as in the
paper. This module selects the target layer for each family of the zoo, and draws the maps of several models side
by side.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from res2net_zoo.data.preprocessing import data_config, evaluation_samples
from res2net_zoo.utils import packages
from res2net_zoo.utils.command_line import closest
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import temporary_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LISTED = 20  # maximum number of classes that an error lists; beyond it, only the first and the last


@dataclass
class Activation:
    """The activation map of one model for one image.

    Attributes:
        model: The model's name.
        picture: Model input without normalization, (H, W, 3) from 0 to 1.
        heat: Activation map, (H, W) from 0 to 1.
        score: Softmax score of the class.
    """

    model: str
    picture: np.ndarray
    heat: np.ndarray
    score: float


def require() -> None:
    """Check that the dependencies of activation maps are installed.

    Raises:
        InputError: One is missing.
    """
    packages.require("class activation maps need", "cam", "grad-cam", "matplotlib")


def target_layer(model: nn.Module) -> nn.Module:
    """Return the layer whose output is the last feature map before pooling and classifier.

    Args:
        model: A timm model with `feature_info`.

    Raises:
        InputError: The model lacks `feature_info`.
    """
    info = getattr(model, "feature_info", None)
    if not info:
        raise InputError(f"{type(model).__name__} is unsupported: it has no feature_info to find its last map")
    return model.get_submodule(list(info)[-1]["module"])


def activation_maps(
    model: nn.Module, images: torch.Tensor, classes: Sequence[int], method: str = "GradCAM"
) -> tuple[np.ndarray, torch.Tensor]:
    """Compute the activation map of a class for each image.

    Args:
        model: The model, in eval mode.
        images: Normalized images (N, C, H, W).
        classes: Class index for each image.
        method: Class of `pytorch_grad_cam` that computes the maps.

    Returns:
        The maps (N, H, W), each from 0 to 1, and the logits (N, classes).

    Raises:
        InputError: The last layer does not return a feature map, as in a transformer.
    """
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer, shape = target_layer(model), torch.Size()

    def record_shape(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal shape
        shape = getattr(output, "shape", torch.Size())

    handle = layer.register_forward_hook(record_shape)
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    if len(shape) != 4:
        raise InputError(f"the last layer of {type(model).__name__} does not return a map (N, C, H, W)")
    cam = getattr(pytorch_grad_cam, method)(model=model, target_layers=[layer])
    try:
        heat = cam(images, [ClassifierOutputTarget(index) for index in classes])
    finally:
        cam.activations_and_grads.release()
    return heat, logits


class LastMap(nn.Module):
    """A classifier up to its last feature map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the map (N, C, h, w) that is pooled, for images (N, C, H, W)."""
        model: Any = self.model
        return model.forward_features(images)


@torch.no_grad()
def check_linear_head(model: Any, image: torch.Tensor) -> None:
    """Check that a classifier consists of average pooling and one linear layer, as `class_maps` needs.

    Args:
        model: The model, in eval mode.
        image: A normalized image (1, C, H, W).

    Raises:
        InputError: It has a different head, or its target layer does not return the map that is pooled.
    """
    maps: list[Any] = []
    handle = target_layer(model).register_forward_hook(lambda _, __, output: maps.append(output))
    logits = model(image)
    handle.remove()
    weight, bias = (getattr(model.get_classifier(), name, None) for name in ("weight", "bias"))
    pooled = maps[0].mean((2, 3)) if getattr(maps[0], "ndim", 0) == 4 else None
    if pooled is not None and weight is not None and weight[0].numel() == pooled.shape[1]:
        found = nn.functional.linear(pooled, weight.flatten(1), bias)
        if torch.allclose(found, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item()):
            return
    raise InputError(
        f"{type(model).__name__} has a head other than average pooling and one linear layer, so its activation "
        "maps need gradients, which plain PyTorch computes",
        "backend",
    )


@torch.no_grad()
def class_maps(model: Any, features: torch.Tensor, classes: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Compute the Grad-CAM maps of `activation_maps` without gradients, as CAM (Zhou et al., arXiv 1512.04150).

    With one linear layer after average pooling, both methods are identical (Selvaraju et al., Section 3.1).

    Args:
        model: A model for which `check_linear_head` passes.
        features: Its last maps (N, C, h, w).
        classes: Class index for each image.
        size: Height and width of the images.

    Returns:
        The maps (N, H, W), each from 0 to 1.
    """
    from pytorch_grad_cam.utils.image import scale_cam_image

    weight = model.get_classifier().weight.flatten(1)[list(classes)]
    heat = torch.einsum("nchw,nc->nhw", features, weight).clamp(min=0).cpu().numpy()
    return scale_cam_image(scale_cam_image(heat, tuple(size)[::-1]))  # twice, as grad-cam does


def load_image(model: Any, path: str) -> torch.Tensor:
    """Read an image and preprocess it for a model.

    Returns:
        The image (1, C, H, W).

    Raises:
        InputError: It cannot be decoded.
    """
    sample = evaluation_samples(model)(path, {"image": {"bytes": None, "path": path}})
    if sample.image is None:
        raise InputError(f"{path} is corrupt ({sample.corrupt or sample.fatal})")
    return sample.image[None]


def picture(model: Any, image: torch.Tensor) -> np.ndarray:
    """Convert a normalized image (1, C, H, W) to a picture (H, W, 3) from 0 to 1."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = (image[0].cpu() * std + mean).clamp(0, 1)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()


def check_format(path: Path) -> None:
    """Check that a file name has the suffix of a supported picture format.

    Raises:
        InputError: The suffix is unsupported, or the path is a folder.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.is_dir() or path.suffix[1:].lower() not in formats:
        raise InputError(f"{path} must end in one of .{' .'.join(sorted(formats))}")


def find_class(word: str, names: Sequence[str]) -> int:
    """Return the index of a class.

    Args:
        word: A class name, one of the synonyms in a name (`tench` of `tench, Tinca tinca`), or an index.
        names: Names of all classes.

    Raises:
        InputError: The class is unknown or ambiguous.
    """
    wanted = word.strip().lower()
    short = [[part.strip().lower() for part in name.split(",")] for name in names]
    found = [i for i, name in enumerate(names) if wanted == name.lower()]
    found = found or [i for i, parts in enumerate(short) if wanted in parts]
    if len(found) > 1:
        raise InputError(f"{word} is ambiguous: it names the classes {', '.join(map(str, found))}; use a number")
    if not found and word.isdecimal() and int(word) < len(names):
        return int(word)
    if not found:
        every = [part for parts in short for part in parts]
        # Names that contain the word, such as `eskimo dog` for `dog`, precede similar spellings.
        close = [part for part in every if re.search(rf"\b{re.escape(wanted)}\b", part)] or closest(wanted, every)
        hint = f"did you mean {' or '.join(close[:5])}? " if close and wanted else ""
        listed = f"{', '.join(names)}, by name or by number from 0"
        if len(names) > LISTED:
            listed = f"0 ({names[0]}) to {len(names) - 1} ({names[-1]})"
        raise InputError(f"there is no class {word}; {hint}there are {len(names)}: {listed}")
    return found[0]


def draw(rows: Sequence[tuple[str, str, Sequence[Activation]]], path: Path) -> None:
    """Draw a picture with one row per image: the model input, then the map of each model.

    Args:
        rows: For each image its name, the name of the class, and the map of each model.
        path: File to write; the suffix selects the format.

    Raises:
        InputError: The file cannot be written; an existing file is kept.
    """
    try:
        with temporary_file(path) as temporary:
            figure(rows).savefig(temporary, format=path.suffix[1:].lower())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def figure(rows: Sequence[tuple[str, str, Sequence[Activation]]]) -> "Figure":
    """Return the figure of `draw`."""
    from matplotlib.figure import Figure

    columns = 1 + len(rows[0][2])
    figure = Figure(figsize=(2.6 * columns + 0.6, 3.1 * len(rows)), dpi=150, layout="compressed")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (image, name, seen) in zip(grid, rows, strict=True):
        axes[0].imshow(seen[0].picture)
        axes[0].set_title(f"{_wrapped(image)}\n{_wrapped(name)}", fontsize=8, parse_math=False)
        for axis, one in zip(axes[1:], seen, strict=True):
            axis.imshow(one.picture)
            heat = axis.imshow(one.heat, cmap="jet", vmin=0, vmax=1, alpha=0.5, interpolation="bicubic")
            axis.set_title(f"{_wrapped(one.model)}\n{100 * one.score:.1f} %", fontsize=8, parse_math=False)
    for axis in grid.flat:
        # With `set_axis_off`, the layout leaves no room for the title.
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(heat, ax=grid, aspect=15 * len(rows), ticks=[0, 0.5, 1])
    bar.set_label("activation relative to the maximum", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _wrapped(text: str) -> str:
    """Wrap a text to the width of a map."""
    return "\n".join(textwrap.wrap(printable(text), 36, max_lines=2, placeholder="...", break_on_hyphens=False))
