"""Class activation maps: where in an image a model sees a class (paper, Section 4.5 and Figure 4).

The maps are the grad-cam package's; by default Grad-CAM's (Selvaraju et al., arXiv 1610.02391), which the
paper uses. What is ours is the layer that they are taken from, for every family of the zoo, and the
picture that sets models side by side.
"""

import importlib.util
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
from res2net_zoo.utils.command_line import closest
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import temporary_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LISTED = 20  # classes that an error names; of more only the first and the last


@dataclass
class Seen:
    """What one model sees in one image.

    Attributes:
        model: The model's name.
        picture: What it was shown, (H, W, 3) from 0 to 1.
        heat: The map, (H, W) from 0 to 1.
        score: Its softmax score of the class.
    """

    model: str
    picture: np.ndarray
    heat: np.ndarray
    score: float


def require() -> None:
    """Check that what draws maps is installed.

    Raises:
        InputError: It is not.
    """
    modules = {"grad-cam": "pytorch_grad_cam", "matplotlib": "matplotlib"}
    missing = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"class activation maps need {' and '.join(missing)}; pip install 'res2net-zoo[cam]'")


def target_layer(model: nn.Module) -> nn.Module:
    """Return the layer whose output is the last map before pooling and classifier.

    Args:
        model: Any timm model that says where its features come from.

    Raises:
        InputError: The model does not say so.
    """
    info = getattr(model, "feature_info", None)
    if not info:
        raise InputError(f"{type(model).__name__} does not say which of its layers makes its last map")
    return model.get_submodule(list(info)[-1]["module"])


def activation_maps(
    model: nn.Module, images: torch.Tensor, classes: Sequence[int], method: str = "GradCAM"
) -> tuple[np.ndarray, torch.Tensor]:
    """Compute where a model sees a class in each image.

    Args:
        model: The model, in eval mode.
        images: (N, C, H, W), as the model takes them.
        classes: A class for each image.
        method: The class of `pytorch_grad_cam` that makes them.

    Returns:
        The maps, (N, H, W), each from 0 to 1, and the logits, (N, classes).

    Raises:
        InputError: The last layer makes no map, as in a transformer.
    """
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer, shape = target_layer(model), torch.Size()

    def listen(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal shape
        shape = getattr(output, "shape", torch.Size())

    handle = layer.register_forward_hook(listen)
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    if len(shape) != 4:
        raise InputError(f"the last layer of {type(model).__name__} makes no map (N, C, H, W)")
    cam = getattr(pytorch_grad_cam, method)(model=model, target_layers=[layer])
    try:
        heat = cam(images, [ClassifierOutputTarget(index) for index in classes])
    finally:
        cam.activations_and_grads.release()
    return heat, logits


def load(model: Any, path: str) -> torch.Tensor:
    """Read an image as a model takes it.

    Returns:
        (1, C, H, W).

    Raises:
        InputError: It cannot be decoded.
    """
    sample = evaluation_samples(model)(path, {"image": {"bytes": None, "path": path}})
    if sample.image is None:
        raise InputError(f"{path} is corrupt ({sample.corrupt or sample.fatal})")
    return sample.image[None]


def picture(model: Any, image: torch.Tensor) -> np.ndarray:
    """Undo a model's normalization: (1, C, H, W) to (H, W, 3) from 0 to 1."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = (image[0].cpu() * std + mean).clamp(0, 1)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()


def check_format(path: Path) -> None:
    """Check that a picture can be written to a file of this name.

    Raises:
        InputError: It cannot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.is_dir() or path.suffix[1:].lower() not in formats:
        raise InputError(f"a picture's name ends in one of .{' .'.join(sorted(formats))}; {path} does not")


def find_class(word: str, names: Sequence[str]) -> int:
    """Return the class that a word names.

    Args:
        word: A class name, one of several that a name lists (`tench` of `tench, Tinca tinca`), or a number.
        names: The classes' names.

    Raises:
        InputError: There is none, or there are several.
    """
    wanted = word.strip().lower()
    short = [[part.strip().lower() for part in name.split(",")] for name in names]
    found = [i for i, name in enumerate(names) if wanted == name.lower()]
    found = found or [i for i, parts in enumerate(short) if wanted in parts]
    if len(found) > 1:
        raise InputError(f"{word} is the name of classes {', '.join(map(str, found))}; give a number")
    if not found and word.isdecimal() and int(word) < len(names):
        return int(word)
    if not found:
        every = [part for parts in short for part in parts]
        # What has the word in it, such as `eskimo dog` for `dog`, comes before what is spelt alike.
        close = [part for part in every if re.search(rf"\b{re.escape(wanted)}\b", part)] or closest(wanted, every)
        hint = f"did you mean {' or '.join(close[:5])}? " if close and wanted else ""
        listed = f"{', '.join(names)}, by name or by number from 0"
        if len(names) > LISTED:
            listed = f"0 ({names[0]}) to {len(names) - 1} ({names[-1]})"
        raise InputError(f"there is no class {word}; {hint}there are {len(names)}: {listed}")
    return found[0]


def draw(rows: Sequence[tuple[str, str, Sequence[Seen]]], path: Path) -> None:
    """Draw the picture: a row for each image, what was shown first, then a map for each model.

    Args:
        rows: Of each image its name, the name of the class, and what each model sees.
        path: Where to write it; the suffix says in which format.

    Raises:
        InputError: It cannot be written; what was there stays.
    """
    try:
        with temporary_file(path) as temporary:
            figure(rows).savefig(temporary, format=path.suffix[1:].lower())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def figure(rows: Sequence[tuple[str, str, Sequence[Seen]]]) -> "Figure":
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
        # With `set_axis_off` the layout would leave no room for the title.
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(heat, ax=grid, aspect=15 * len(rows), ticks=[0, 0.5, 1])
    bar.set_label("activation over the map's largest", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _wrapped(text: str) -> str:
    """Return a text as lines that are no wider than a map."""
    return "\n".join(textwrap.wrap(printable(text), 36, max_lines=2, placeholder="...", break_on_hyphens=False))
