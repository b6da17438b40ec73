"""Semantic segmentation (paper, Table 7): the class of each pixel.

Networks are segmentation_models_pytorch's DeepLab v3+ (Chen et al., arXiv 1802.02611) at output stride
16, as in the paper, U-Net and FPN. Data are in PASCAL VOC's layout: JPEGImages, SegmentationClass with class
indices (255 is ignored), ImageSets/Segmentation/SPLIT.txt, and, for classes other than VOC's, a classes.txt
with one name per line, starting with the background.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import nn
from torchvision.transforms.v2 import functional as TF

from res2net_zoo.data.images import open_image
from res2net_zoo.tasks import annotations as checked
from res2net_zoo.tasks.base import NO_IMAGE, Annotated, Figures, Score, TaskModel, check_options, reason
from res2net_zoo.tasks.drawing import run_lengths
from res2net_zoo.tasks.upright import Frames, Turn, read_rgb
from res2net_zoo.utils.console import progress_bar, warn
from res2net_zoo.utils.errors import InputError

VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
IGNORED = 255  # VOC's index of ignored pixels, such as borders
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")


class VOCMasks(Annotated):
    """Images with one mask of class indices each, in VOC's layout.

    Args:
        folder: The folder that contains JPEGImages and SegmentationClass.
        split: Name of a list in ImageSets/Segmentation.

    Raises:
        InputError: A list, image or mask is missing, or a mask does not match its image or the classes.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        lists = folder / "ImageSets" / "Segmentation"
        self.list = lists / f"{split}.txt"
        if not self.list.is_file():
            there = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
            raise InputError(
                f"{folder} has no ImageSets/Segmentation/{split}.txt, as in VOC's layout; available lists: {there}"
            )
        self.pairs = list_masks(folder, self.list)
        named = folder / "classes.txt"
        self.own_classes = named.is_file()
        self.classes = checked.read_classes(named) if self.own_classes else list(VOC)
        self.turns: dict[int, Turn] = {}
        frames, self.counts = Frames(), np.zeros(256, dtype=np.int64)
        for i in progress_bar(None, range(len(self)), desc="check the masks", unit="mask"):
            self.counts += self._check(i, frames)
        frames.warn()
        if not self.counts[:IGNORED].any():
            raise InputError(f"all pixels of all masks, such as {self.mask_path(0)}, are {IGNORED}, which is ignored")

    @property
    def absent(self) -> list[str]:
        """Classes that do not occur in any mask."""
        return [name for number, name in enumerate(self.classes) if not self.counts[number]]

    def remarks(self) -> dict[str, str]:
        """Return the classes that do not occur in any mask."""
        return {f"classes without a pixel in {self.split}": ", ".join(self.absent)} if self.absent else {}

    def check_classes(self, train: bool) -> None:
        """Check that all classes occur in the masks.

        Args:
            train: Whether the data are for training.

        Raises:
            InputError: The masks contain only the background, or seem to mark a class with 255.
        """
        if not self.absent or len(self.classes) == 1:
            return
        ignored = self.counts[IGNORED] > 0
        some = ", ".join(self.absent[:5]) + ", ..." * (len(self.absent) > 5)
        what = f"no mask of {self.list} has a pixel of the class{'es' * (len(self.absent) > 1)} {some}"
        alone = len(self.absent) == len(self.classes) - 1
        if (alone and (train or ignored)) or (train and ignored and self.own_classes):
            number = self.classes.index(self.absent[0])
            hint = f"{IGNORED} is ignored: if it marks a class, replace it by the index of the class, such as {number}"
            raise InputError(f"{what}; {hint if ignored else 'correct the masks or classes.txt'}")
        warn(f"{what}; {'the model cannot learn it' if train else 'mIoU skips them unless the model predicts them'}")

    def _check(self, i: int, frames: Frames) -> np.ndarray:
        path, mask_path = self.pairs[i]
        if not mask_path.is_file():
            raise InputError(f"the mask {mask_path} of {path}, which {self.list} names, is missing")
        try:
            with open_image(mask_path) as mask:
                check_numbers(mask)
                size, counts = mask.size, np.bincount(np.asarray(mask).ravel(), minlength=256)
        except NO_IMAGE as error:
            raise InputError(f"cannot read the mask {mask_path}: {reason(error, mask_path)}") from error
        turn = frames.turn(path, size, self.list, f"its mask {mask_path} is")
        if turn is not None:
            self.turns[i] = turn
        wrong = np.flatnonzero(counts[len(self.classes) : IGNORED])
        if len(wrong):
            raise InputError(
                f"the mask {mask_path} contains the class index {len(self.classes) + wrong[0]}, but the "
                f"{len(self.classes)} classes are numbered from 0"
            )
        return counts

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> Path:
        """Return the path of an image."""
        return self.pairs[i][0]

    def mask_path(self, i: int) -> Path:
        """Return the path of an image's mask."""
        return self.pairs[i][1]

    def __getitem__(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        with open_image(self.mask_path(i)) as mask:
            turn = self.turns.get(i)
            numbers = np.array(mask if turn is None else mask.transpose(turn), dtype=np.int64)
        return read_rgb(self.path(i)), {"mask": torch.from_numpy(numbers)}


def list_masks(folder: Path, path: Path) -> list[checked.Pair]:
    """Return the images and masks in a list of VOC's layout, which names images or pairs of both."""
    images, masks = folder / "JPEGImages", folder / "SegmentationClass"

    def single(line: str) -> checked.Pair | None:
        image = checked.find_file(folder, images, line, (".jpg",), path)
        if image is None:
            return None
        inside = image.relative_to(images) if image.is_relative_to(images) else Path(image.name)
        return image, (masks / inside).with_suffix(".png")

    def pair(one: str, other: str) -> checked.Pair | None:
        image, mask = (
            checked.find_file(folder, place, name, (), path) for place, name in ((images, one), (masks, other))
        )
        return None if image is None or mask is None else (image, mask)

    return checked.read_list(path, single, pair)


def check_numbers(mask: Image.Image) -> None:
    """Check that the pixels of an opened mask are class indices.

    Raises:
        OSError: They are not.
    """
    if mask.mode not in ("P", "L"):
        raise OSError(f"its mode is {mask.mode}; class indices must be 8-bit grey (L) or palette indices (P)")
    if mask.format in LOSSY:
        raise OSError(f"its format is {mask.format}, whose lossy compression changes class indices; store it as PNG")
    packed = str(mask.tile[0].args) if isinstance(mask, PngImageFile) and mask.tile else ""
    if packed in ("L;2", "L;4"):
        # Pillow scales these to 0 to 255, which turns class 1 into 85 or 17.
        raise OSError(f"it is {packed[2:]}-bit grey; class indices must be 8-bit grey (L) or palette indices (P)")


class MeanIoU(Score):
    """Mean intersection over union of the classes, over all pixels of all images, in percent.

    Attributes:
        by_class: IoU of each class, after `compute`; None for a class that is absent from masks and predictions.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)
        self.by_class: dict[str, float | None] = {}

    def update(self, i: int, target: dict[str, Any], prediction: torch.Tensor) -> None:
        """Count pixels by their true and their predicted class."""
        true, predicted = target["mask"].flatten().cpu(), prediction.flatten().cpu()
        kept = true != IGNORED
        pairs = true[kept] * len(self.classes) + predicted[kept]
        self.confusion += torch.bincount(pairs, minlength=len(self.classes) ** 2).view_as(self.confusion)

    def compute(self, accelerator: Accelerator) -> Figures:
        """Return mIoU and pixel accuracy; mIoU skips classes that are absent from masks and predictions."""
        confusion = accelerator.reduce(self.confusion.to(accelerator.device), "sum").cpu().double()
        both, either = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        there = either > 0
        iou = 100 * both[there] / either[there]
        every: list[float | None] = [None] * len(self.classes)
        for number, value in zip(there.nonzero().flatten().tolist(), iou.tolist(), strict=True):
            every[number] = value
        self.by_class = dict(zip(self.classes, every, strict=True))
        return {"mIoU": iou.mean().item(), "pixel accuracy": (100 * both.sum() / confusion.sum()).item()}

    def details(self) -> dict[str, Any]:
        """Return the IoU of each class, None for a class that is absent from masks and predictions."""
        return {"IoU": self.by_class}


class Segmentation(TaskModel):
    """Semantic segmentation."""

    task = "segmentation"
    hub_task = "image-segmentation"
    heads = ("deeplabv3plus", "unet", "fpn")
    img_size = 513  # DeepLab's crop size for VOC; inputs are padded to a multiple of 32
    scales = (0.5, 2.0)  # DeepLab's
    best = "mIoU"
    requires: ClassVar = ("segmentation-models-pytorch",)

    def __init__(
        self,
        model: str,
        classes: Sequence[str],
        head: str | None = None,
        img_size: int | None = None,
        output_stride: int | None = None,
        **kwargs: Any,
    ) -> None:
        if output_stride is None and head in (None, "deeplabv3plus"):
            output_stride = 16  # Table 7
        super().__init__(model, classes, head, img_size, output_stride, **kwargs)

    @classmethod
    def open(cls, data: str, split: str, head: str, classes: Sequence[str] | None = None) -> VOCMasks:
        """Open a folder in VOC's layout."""
        found = VOCMasks(Path(data), split)
        if classes is not None and list(classes) != found.classes:
            raise InputError(
                f"the classes of {data} ({', '.join(found.classes)}) differ from the model's ({', '.join(classes)})"
            )
        found.check_classes(train=classes is None)
        return found

    def build(self, features: Any, **kwargs: Any) -> nn.Module:
        """Build the network of segmentation_models_pytorch with `kwargs`, and copy the backbone's weights into it."""
        import segmentation_models_pytorch as smp

        network = {"deeplabv3plus": smp.DeepLabV3Plus, "unet": smp.Unet, "fpn": smp.FPN}[self.settings["head"]]
        check_options(network, kwargs)
        stride = self.settings["output_stride"]
        if network is smp.DeepLabV3Plus:
            kwargs = {"encoder_output_stride": stride, **kwargs}
        elif stride not in (None, 32):
            raise InputError(f"{self.settings['head']} needs features of stride 32, not {stride}")
        name, classes = f"tu-{self.settings['model']}", len(self.settings["classes"])
        built = network(name, encoder_weights=None, classes=classes, **kwargs)
        built.encoder.model.load_state_dict(features.state_dict())
        return built

    @property
    def features(self) -> nn.Module:
        """The backbone in the network's encoder."""
        network: Any = self.network
        return network.encoder.model

    def transform(self, image: Image.Image, target: dict[str, Any], train: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """Scale, crop and mirror in training, as DeepLab does; keep the whole image in evaluation."""
        pixels = TF.to_dtype(TF.pil_to_tensor(image), scale=True)
        if not train:
            return pixels, target
        mask = target["mask"]
        size = self.settings["img_size"]
        scale = float(torch.empty(()).uniform_(*self.scales))
        shape = [max(1, round(side * scale)) for side in mask.shape]
        pixels = F.interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(mask[None, None].float(), shape, mode="nearest-exact")[0, 0].long()
        missing = [max(0, size - side) for side in shape]
        # Pad with the mean colour, which normalization maps to 0, and the ignored class.
        mean = torch.tensor(self.settings["mean"]).view(-1, 1, 1)  # self.mean may be on a GPU
        pixels = F.pad(pixels - mean, (0, missing[1], 0, missing[0])) + mean
        mask = F.pad(mask, (0, missing[1], 0, missing[0]), value=IGNORED)
        top, left = (int(torch.randint(0, side - size + 1, ())) for side in mask.shape)
        pixels, mask = pixels[:, top : top + size, left : left + size], mask[top : top + size, left : left + size]
        if torch.rand(()) < 0.5:
            pixels, mask = pixels.flip(2), mask.flip(1)
        return pixels, {"mask": mask}

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """Return the mean cross entropy of the pixels, or a mask (H, W) per image."""
        if targets is not None and self.training:
            logits = self.logits(torch.stack(images))
            masks = torch.stack([target["mask"] for target in targets])
            losses = F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="none").flatten(1)
            # The mean over images of their means, so that averaging over processes averages over all images.
            return {"loss": (losses.sum(1) / (masks != IGNORED).flatten(1).sum(1).clamp(min=1)).mean()}
        # One image at a time: batch padding would change the result.
        return [self.logits(image[None])[0].argmax(0).cpu() for image in images]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, classes, H, W) for images (N, 3, H, W) of any size."""
        h, w = images.shape[2:]
        padded = F.pad(self.normalize(images), (0, -w % 32, 0, -h % 32))
        return self.network(padded.contiguous(memory_format=torch.channels_last))[:, :, :h, :w]

    def score(self, data: Annotated) -> MeanIoU:
        """Return mean IoU."""
        return MeanIoU(data.classes)

    def draw(self, image: Image.Image, prediction: Any, threshold: float | None = None) -> Image.Image:
        """Colour each pixel by its class, in VOC's colours; the background is not coloured."""
        from torchvision.utils import draw_segmentation_masks

        classes = range(1, len(self.settings["classes"]))
        masks = torch.stack([prediction == number for number in classes])
        colours: Any = [voc_colour(number) for number in classes]
        drawn = draw_segmentation_masks(TF.pil_to_tensor(image), masks, alpha=0.6, colors=colours)
        return TF.to_pil_image(drawn)

    def to_records(self, prediction: Any, threshold: float | None = None) -> list[dict[str, Any]]:
        """Return `label`, `area` in pixels and `segmentation` of each class in the image except the background."""
        objects = []
        for number, name in enumerate(self.settings["classes"]):
            mask = prediction == number
            if number and (area := int(mask.sum())):
                objects.append({"label": name, "area": area, "segmentation": run_lengths(mask)})
        return objects


def voc_colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a class in VOC's palette, whose channels interleave the bits of the class index."""
    red, green, blue = (sum((number >> (3 * i + channel) & 1) << (7 - i) for i in range(8)) for channel in range(3))
    return red, green, blue
