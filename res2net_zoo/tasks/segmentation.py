"""Semantic segmentation (paper, Table 7): which class each pixel is of.

Networks are segmentation_models_pytorch's: DeepLab v3+ (Chen et al., arXiv 1802.02611) at output stride
16, as in the paper, U-Net and FPN. Data are in PASCAL VOC's layout: JPEGImages, SegmentationClass with a
palette's numbers (255 for what counts for nothing), ImageSets/Segmentation/SPLIT.txt, and, for classes
other than VOC's, a classes.txt with a name a line, the background's first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF

from res2net_zoo.images import open_image
from res2net_zoo.program import InputError, progress_bar
from res2net_zoo.tasks.base import NO_IMAGE, Annotated, Figures, Score, TaskModel, check_options, read_lines

VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
IGNORED = 255  # VOC's number for a border that counts for nothing


class VOCMasks(Annotated):
    """Images with a mask of class numbers each, in VOC's layout.

    Args:
        folder: The folder of JPEGImages and its neighbours.
        split: A list in ImageSets/Segmentation.

    Raises:
        InputError: A list, image or mask that is missing, or a mask that is not one of its image.
    """

    def __init__(self, folder: Path, split: str) -> None:
        lists = folder / "ImageSets" / "Segmentation"
        if not (lists / f"{split}.txt").is_file():
            there = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
            raise InputError(
                f"{folder} has no ImageSets/Segmentation/{split}.txt of VOC's layout; lists there: {there}"
            )
        self.folder = folder
        self.names = [line.split()[0] for line in read_lines(lists / f"{split}.txt")]
        if not self.names:
            raise InputError(f"{lists / split}.txt lists no images")
        named = folder / "classes.txt"
        self.classes = read_lines(named) if named.is_file() else list(VOC)
        every = progress_bar(None, range(len(self)), desc="check the masks", unit="mask")
        if not any([self._check(i) for i in every]):  # noqa: C419  all are to be checked
            raise InputError(f"no mask like {self.mask_path(0)} has a pixel that counts: all are {IGNORED}")

    def _check(self, i: int) -> bool:
        for path in (self.path(i), self.mask_path(i)):
            if not path.is_file():
                raise InputError(f"there is no {path}, which the list names")
        try:
            with open_image(self.path(i)) as image, open_image(self.mask_path(i)) as mask:
                if image.size != mask.size:
                    sizes = "{} x {}, its image {} x {}".format(*mask.size, *image.size)
                    raise InputError(f"the mask {self.mask_path(i)} is {sizes}; they must be alike")
                numbers = np.unique(np.asarray(mask))
                if mask.mode not in ("P", "L"):
                    raise InputError(f"the mask {self.mask_path(i)} is of mode {mask.mode}; class numbers are P or L")
        except NO_IMAGE as error:
            raise InputError(f"cannot read {self.path(i)} or its mask: {error}") from error
        wrong = numbers[(numbers >= len(self.classes)) & (numbers != IGNORED)]
        if len(wrong):
            raise InputError(
                f"the mask {self.mask_path(i)} has the number {wrong[0]}, and there are {len(self.classes)} classes"
            )
        return bool((numbers != IGNORED).any())

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        """Return an image's file."""
        return self.folder / "JPEGImages" / f"{self.names[i]}.jpg"

    def mask_path(self, i: int) -> Path:
        """Return the file of its mask."""
        return self.folder / "SegmentationClass" / f"{self.names[i]}.png"

    def __getitem__(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        with open_image(self.mask_path(i)) as mask:
            numbers = torch.from_numpy(np.array(mask, dtype=np.int64))
        with open_image(self.path(i)) as image:
            return image.convert("RGB"), {"mask": numbers}


class MeanIoU(Score):
    """Mean over the classes of intersection over union, counted over all pixels of all images, in percent."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)

    def update(self, i: int, target: dict[str, Any], prediction: torch.Tensor) -> None:
        """Count pixels, by what they are and what they were taken for."""
        right, said = target["mask"].flatten().cpu(), prediction.flatten().cpu()
        kept = right != IGNORED
        pairs = right[kept] * len(self.classes) + said[kept]
        self.confusion += torch.bincount(pairs, minlength=len(self.classes) ** 2).view_as(self.confusion)

    def compute(self, accelerator: Accelerator) -> Figures:
        """Return mIoU and pixel accuracy; a class that is nowhere, neither there nor said, does not count."""
        confusion = accelerator.reduce(self.confusion.to(accelerator.device), "sum").cpu().double()
        both, either = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        there = either > 0
        iou = 100 * both[there] / either[there]
        return {"mIoU": iou.mean().item(), "pixel accuracy": (100 * both.sum() / confusion.sum()).item()}


class Segmentation(TaskModel):
    """Semantic segmentation."""

    task = "segmentation"
    hub_task = "image-segmentation"
    heads = ("deeplabv3plus", "unet", "fpn")
    img_size = 513  # DeepLab's crops of VOC; networks see the next multiple of 32
    scales = (0.5, 2.0)  # DeepLab's
    best = "mIoU"
    requires: ClassVar = {"segmentation_models_pytorch": "segmentation-models-pytorch"}

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
                f"{data} has other classes ({', '.join(found.classes)}) than the model ({', '.join(classes)})"
            )
        return found

    def build(self, features: Any, **kwargs: Any) -> nn.Module:
        """Build smp's network, with `kwargs` for it, and give its encoder the backbone."""
        import segmentation_models_pytorch as smp

        network = {"deeplabv3plus": smp.DeepLabV3Plus, "unet": smp.Unet, "fpn": smp.FPN}[self.settings["head"]]
        check_options(network, kwargs)
        stride = self.settings["output_stride"]
        if network is smp.DeepLabV3Plus:
            kwargs = {"encoder_output_stride": stride, **kwargs}
        elif stride not in (None, 32):
            raise InputError(f"{self.settings['head']} takes features of stride 32, not {stride}")
        name, classes = f"tu-{self.settings['model']}", len(self.settings["classes"])
        built = network(name, encoder_weights=None, classes=classes, **kwargs)
        built.encoder.model.load_state_dict(features.state_dict())
        return built

    @property
    def features(self) -> nn.Module:
        """The backbone, which the encoder of smp's network holds."""
        network: Any = self.network
        return network.encoder.model

    def transform(self, image: Image.Image, target: dict[str, Any], train: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """For training scale, crop and mirror, as DeepLab does; else take the whole image."""
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
        # The mean colour, which becomes 0, and no class.
        mean = torch.tensor(self.settings["mean"]).view(-1, 1, 1)  # self.mean may be on a GPU, of no use in a loader
        pixels = F.pad(pixels - mean, (0, missing[1], 0, missing[0])) + mean
        mask = F.pad(mask, (0, missing[1], 0, missing[0]), value=IGNORED)
        top, left = (int(torch.randint(0, side - size + 1, ())) for side in mask.shape)
        pixels, mask = pixels[:, top : top + size, left : left + size], mask[top : top + size, left : left + size]
        if torch.rand(()) < 0.5:
            pixels, mask = pixels.flip(2), mask.flip(1)
        return pixels, {"mask": mask}

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """Return the mean cross entropy of the pixels, or for each image its mask (H, W)."""
        if targets is not None and self.training:
            logits = self.logits(torch.stack(images))
            masks = torch.stack([target["mask"] for target in targets])
            losses = F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="none").flatten(1)
            # The mean over images of each one's mean, so that the mean over processes is that over all their images.
            return {"loss": (losses.sum(1) / (masks != IGNORED).flatten(1).sum(1).clamp(min=1)).mean()}
        # One after the other: padded to the largest, an image would be told otherwise in other company.
        return [self.logits(image[None])[0].argmax(0).cpu() for image in images]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the classes' logits (N, classes, H, W) of images (N, 3, H, W) of any size."""
        h, w = images.shape[2:]
        padded = F.pad(self.normalize(images), (0, -w % 32, 0, -h % 32))
        return self.network(padded.contiguous(memory_format=torch.channels_last))[:, :, :h, :w]

    def score(self, data: Annotated) -> MeanIoU:
        """Return mean IoU."""
        return MeanIoU(data.classes)

    def draw(self, image: Image.Image, prediction: torch.Tensor) -> Image.Image:
        """Colour each pixel by its class, in VOC's colours; the background stays."""
        from torchvision.utils import draw_segmentation_masks

        classes = range(1, len(self.settings["classes"]))
        masks = torch.stack([prediction == number for number in classes])
        colours: Any = [voc_colour(number) for number in classes]
        drawn = draw_segmentation_masks(TF.pil_to_tensor(image), masks, alpha=0.6, colors=colours)
        return TF.to_pil_image(drawn)


def voc_colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a class in VOC's palette: its number's bits, dealt out from the highest of each channel."""
    red, green, blue = (sum((number >> (3 * i + channel) & 1) << (7 - i) for i in range(8)) for channel in range(3))
    return red, green, blue
