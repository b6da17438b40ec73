"""Salient object detection (paper, Table 9): the saliency of each pixel.

The network is DSS (Hou et al., "Deeply Supervised Salient Object Detection with Short Connections", CVPR
2017 and TPAMI 2019, arXiv 1611.04849, Section 3), without the optional conditional random field. Data are
folders of images and of grey masks, in any of the layouts of `Masks`.
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF

from res2net_zoo.data.images import open_image, to_mode
from res2net_zoo.tasks import annotations as checked
from res2net_zoo.tasks.base import NO_IMAGE, Annotated, Figures, Score, TaskModel, check_options, reason
from res2net_zoo.tasks.drawing import run_lengths
from res2net_zoo.tasks.upright import Frames, Turn, read_rgb
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError

IMAGE_FOLDERS = ("images", "image", "imgs", "img")  # case-insensitive
MASK_FOLDERS = ("masks", "mask", "ground_truth_mask", "gt")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
ALIKE = 0.9  # minimum IoU of a mask's colours and alpha channel, which may differ at smooth edges


def by_name(root: Path, folders: Sequence[str]) -> dict[str, Path]:
    """Return the image files, by stem and sorted, of the folder in `root` that has one of these names."""
    there = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name.lower() in folders]
    if not there:
        raise InputError(f"{root} has no folder {folders[0]} (or {', '.join(folders[1:])})")
    found: dict[str, Path] = {}
    for path in sorted(there[0].iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise InputError(f"{path} has the same name as {found[path.stem].name}; remove one of them")
            found[path.stem] = path
    return found


class Masks(Annotated):
    """Images with one mask each, in which values over 128 are salient.

    Args:
        folder: Contains SPLIT/images/NAME.jpg and SPLIT/masks/NAME.png; or images/ and masks/ and a list
            SPLIT.txt, each line of which names an image, or an image and its mask. The folders' names in the
            benchmarks are supported, such as ECSSD's ground_truth_mask or HKU-IS's imgs and gt.
        split: Name of the folder or of the list.

    Raises:
        InputError: There are no images, or a mask is missing, unreadable or of a different size than its image.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.classes = ["salient object"]
        root, listed = folder / split, folder / f"{split}.txt"
        if root.is_dir():
            source, self.pairs = root, pairs_by_name(root)
        elif listed.is_file():
            source, self.pairs = listed, list_pairs(folder, listed)
        else:
            raise InputError(f"{folder} must have a folder {split} or a list {split}.txt")
        self.turns: dict[int, Turn] = {}
        frames, shares = Frames(), []
        for i in progress_bar(None, range(len(self)), desc="check the masks", unit="mask"):
            shares.append(self._check(i, source, frames))
        frames.warn()
        # A single mask may be empty or full; if all are, the masks encode objects in another way.
        if max(shares) == 0:
            raise InputError(f"all masks, such as {self.pairs[0][1]}, are empty: no value is over 128")
        if min(shares) == 1:
            raise InputError(f"all masks, such as {self.pairs[0][1]}, are full: no value is 128 or less")

    def _check(self, i: int, source: Path, frames: Frames) -> float:
        path, mask_path = self.pairs[i]
        try:
            mask = read_mask(mask_path)
        except NO_IMAGE as error:
            raise InputError(f"cannot read the mask {mask_path}: {reason(error, mask_path)}") from error
        turn = frames.turn(path, mask.shape[::-1], source, f"its mask {mask_path} is")
        if turn is not None:
            self.turns[i] = turn
        return float(mask.mean())

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> Path:
        """Return the path of an image."""
        return self.pairs[i][0]

    def __getitem__(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        path, mask_path = self.pairs[i]
        mask = read_mask(mask_path)
        if (turn := self.turns.get(i)) is not None:
            mask = np.array(Image.fromarray(mask).transpose(turn))
        return read_rgb(path), {"mask": torch.from_numpy(mask)}


def pairs_by_name(root: Path) -> list[checked.Pair]:
    """Return the images of a folder, each with the mask of the same name.

    Raises:
        InputError: There are no images, or a mask is missing.
    """
    images, masks = by_name(root, IMAGE_FOLDERS), by_name(root, MASK_FOLDERS)
    if not images:
        raise InputError(f"{root} has no images")
    return [(image, mask_of(image, masks)) for image in images.values()]


def mask_of(image: Path, masks: dict[str, Path]) -> Path:
    """Return the mask with the same name as an image.

    Raises:
        InputError: The mask is missing.
    """
    if image.stem not in masks:
        raise InputError(f"the mask for {image} is missing")
    return masks[image.stem]


def list_pairs(folder: Path, path: Path) -> list[checked.Pair]:
    """Return the images and masks of a list that names images, or images and masks."""

    @cache
    def files() -> tuple[dict[str, Path], dict[str, Path]]:
        return by_name(folder, IMAGE_FOLDERS), by_name(folder, MASK_FOLDERS)

    def find(name: str, kind: int) -> Path | None:
        file = checked.find_file(folder, folder, name, (), path)
        if file is None:
            checked.path_inside(folder, folder, name.lstrip("/"), path)
            stem, suffix = os.path.splitext(os.path.basename(name))
            file = files()[kind].get(stem if suffix.lower() in SUFFIXES else stem + suffix)
        return file

    def single(line: str) -> checked.Pair | None:
        if checked.pairs_in(line) and checked.find_file(folder, folder, line, (), path) is None:
            return None
        image = find(line, 0)
        return None if image is None else (image, mask_of(image, files()[1]))

    def pair(one: str, other: str) -> checked.Pair | None:
        image, mask = find(one, 0), find(other, 1)
        return None if image is None or mask is None else (image, mask)

    return checked.read_list(path, single, pair)


def read_mask(path: Path) -> np.ndarray:
    """Return the salient pixels of a mask as a boolean array (H, W): values over 128, as in pysodmetrics.

    If a mask has an alpha channel and a constant colour, as a cut-out object has, the alpha channel is used.

    Raises:
        OSError: Colour and alpha channel show different objects.
    """
    with open_image(path) as mask:
        if not mask.has_transparency_data or mask.mode.startswith("I"):
            return np.asarray(to_mode(mask, "L")) > 128
        mask = mask.convert("RGBA")
        grey, alpha = np.asarray(mask.convert("RGB").convert("L")), np.asarray(mask.getchannel("A"))
    by_colour, by_alpha = grey > 128, alpha > 128
    if np.ptp(alpha) == 0 and (np.ptp(grey) > 0 or alpha[0, 0] == 255):
        return by_colour
    if np.ptp(grey) == 0:
        return by_alpha
    if (by_colour & by_alpha).sum() < ALIKE * (by_colour | by_alpha).sum():
        raise OSError("its colours and its alpha channel show different objects; store it as 8-bit grey")
    return by_colour


class MaxFAndMAE(Score):
    """Maximal F-measure (beta^2 = 0.3) and mean absolute error of 8-bit maps, computed by pysodmetrics.

    The F-measure is the mean over all images at the best of 256 thresholds, after normalizing each map to
    0 to 1. An image without an object has F-measure 0.
    """

    def __init__(self) -> None:
        from py_sod_metrics import MAE, FmeasureHandler, FmeasureV2

        self.images: list[int] = []
        self.f = FmeasureHandler(with_dynamic=True, with_adaptive=False, beta=0.3)
        self.counts, self.mae = FmeasureV2({"F": self.f}), MAE()

    def update(self, i: int, target: dict[str, Any], prediction: torch.Tensor) -> None:
        """Add an image's F-measure at each threshold, and its error."""
        for measure in (self.counts, self.mae):
            measure.step(eight_bits(prediction), target["mask"].numpy().astype(np.uint8) * 255)
        self.images.append(i)

    def compute(self, accelerator: Accelerator) -> Figures:
        """Return both metrics, from 0 to 1."""
        rows = gather_object(list(zip(self.images, self.f.dynamic_results, self.mae.maes, strict=True)))
        _, curves, errors = zip(*sorted(rows, key=lambda row: row[0]), strict=True)
        return {"F-measure": float(np.mean(curves, axis=0).max()), "MAE": float(np.mean(errors))}


def resize(images: torch.Tensor, size: Sequence[int], antialias: bool = False) -> torch.Tensor:
    """Resize (N, C, H, W) by bilinear interpolation."""
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=antialias)


def weighted_sum(maps: int) -> nn.Conv2d:
    """Return a learned weighted sum of maps, initialized to their mean."""
    conv = nn.Conv2d(maps, 1, 1, bias=False)
    nn.init.constant_(conv.weight, 1 / maps)
    return conv


class DSS(nn.Module):
    """Side outputs at each of a backbone's features, with short connections from deeper to shallower ones.

    Side output m is R(m) = A(m) + the sum over i > m of r(m, i) R(i), where A(m) is the output of branch m and the
    r are learned. The paper omits some of the pairs. Each branch is that of the same stride in the paper (Table 1,
    for VGG; resnet/train_resnet.prototxt in its code), but at most as wide as its features.

    Args:
        backbone: timm's `features_only` model.
    """

    # Channels and kernel size of both convolutions in a branch, by the stride of its features.
    BRANCHES: ClassVar = {1: (128, 3), 2: (128, 3), 4: (256, 5), 8: (256, 5), 16: (512, 5), 32: (512, 7)}

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.strides: list[int] = backbone.feature_info.reduction()
        channels: list[int] = backbone.feature_info.channels()
        self.branches = nn.ModuleList(map(self._branch, channels, self.strides))
        n = len(channels)
        self.short = nn.ModuleList(weighted_sum(n - 1 - m) for m in range(n - 1))
        self.fuse = weighted_sum(n)

    @classmethod
    def _branch(cls, channels: int, stride: int) -> nn.Sequential:
        width, kernel = cls.BRANCHES[stride]
        width = min(width, channels)
        convs = [nn.Conv2d(inputs, width, kernel, padding=kernel // 2) for inputs in (channels, width)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits (N, 1, H, W) of each side output for images (N, 3, H, W), followed by the fused ones."""
        sides: list[torch.Tensor] = []
        features = self.backbone(images)
        for m in reversed(range(len(features))):
            side = self.branches[m](features[m])
            if sides:
                side = side + self.short[m](torch.cat([resize(deeper, side.shape[2:]) for deeper in sides], 1))
            sides = [side, *sides]
        sides = [resize(side, images.shape[2:]) for side in sides]
        return [*sides, self.fuse(torch.cat(sides, 1))]


class Saliency(TaskModel):
    """Salient object detection."""

    task = "saliency"
    hub_task = "image-segmentation"
    heads = ("dss",)
    img_size = 352  # usual in the field, and about the number of pixels of an MSRA-B image
    best = "F-measure"
    less_is_better: ClassVar = frozenset({"MAE"})
    tolerance = 0.0005
    requires: ClassVar = ("pysodmetrics",)
    extra = "saliency"
    network: DSS

    @classmethod
    def open(cls, data: str, split: str, head: str, classes: Sequence[str] | None = None) -> Masks:
        """Open folders of images and masks."""
        return Masks(Path(data), split)

    def build(self, features: Any, **kwargs: Any) -> DSS:
        """Build DSS on the backbone."""
        if (stride := self.settings["output_stride"]) not in (None, 32):
            raise InputError(f"dss needs features of stride 32, not {stride}")
        if (size := self.settings["img_size"]) % 32:
            raise InputError(f"dss needs an image size that is a multiple of 32, not {size}")
        check_options(DSS, kwargs)
        return DSS(features, **kwargs)

    @property
    def features(self) -> nn.Module:
        """The backbone of DSS."""
        return self.network.backbone

    def transform(self, image: Image.Image, target: dict[str, Any], train: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """Resize to a square and mirror half of the images in training; keep the image unchanged in evaluation."""
        pixels = TF.to_dtype(TF.pil_to_tensor(image), scale=True)
        if not train:
            return pixels, target
        square = [self.settings["img_size"]] * 2
        pixels = resize(pixels[None], square, antialias=True)[0]
        mask = resize(target["mask"][None, None].float(), square, antialias=True)[0] > 0.5
        if torch.rand(()) < 0.5:
            pixels, mask = pixels.flip(2), mask.flip(2)
        return pixels, {"mask": mask.float()}

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """Return the cross entropy of each side output and of the fused one, or a map (H, W) per image.

        All outputs and pixels have equal weights, as in the paper, but the loss is the mean over pixels, not the sum.
        """
        if targets is not None and self.training:
            masks = torch.stack([target["mask"] for target in targets])
            outputs = self._outputs(torch.stack(images))
            names = [*(f"side {m}" for m in range(1, len(outputs))), "fused"]
            losses = (F.binary_cross_entropy_with_logits(output.float(), masks) for output in outputs)
            return dict(zip(names, losses, strict=True))
        # One image at a time, so that a map does not depend on the rest of the batch, even by rounding.
        return [self._map(image) for image in images]

    def _outputs(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.network(self.normalize(images).contiguous(memory_format=torch.channels_last))

    def _map(self, image: torch.Tensor) -> torch.Tensor:
        *sides, fused = self._outputs(resize(image[None], [self.settings["img_size"]] * 2, antialias=True))
        # As in the paper: the fused map and VGG's second to fourth side outputs, selected by stride.
        chosen = [side for side, stride in zip(sides, self.network.strides, strict=True) if stride in (2, 4, 8)]
        saliency = torch.stack([*chosen, fused]).float().sigmoid().mean(0)
        return resize(saliency, image.shape[1:], antialias=True)[0, 0].clamp(0, 1).cpu()

    def score(self, data: Annotated) -> MaxFAndMAE:
        """Return maximal F-measure and mean absolute error."""
        return MaxFAndMAE()

    def draw(self, image: Image.Image, prediction: Any, threshold: float | None = None) -> Image.Image:
        """Return the map as an 8-bit grey image."""
        return Image.fromarray(eight_bits(prediction))

    def to_records(self, prediction: Any, threshold: float | None = None) -> list[dict[str, Any]]:
        """Return one object: its `label`, and the `area` and `segmentation` of the pixels over 0.5."""
        mask = prediction > 0.5
        return [{"label": self.settings["classes"][0], "area": int(mask.sum()), "segmentation": run_lengths(mask)}]


def eight_bits(saliency: torch.Tensor) -> np.ndarray:
    """Convert a map (H, W) from 0 to 1 to 8-bit values from 0 to 255."""
    return (saliency * 255).round().byte().numpy()
