"""Object detection and instance segmentation (paper, Sections 4.8 and 4.9; Tables 5, 6 and 8).

Networks are torchvision's Faster R-CNN (Ren et al., arXiv 1506.01497), RetinaNet (Lin et al., arXiv
1708.02002) and Mask R-CNN (He et al., arXiv 1703.06870), all on a feature pyramid (Lin et al., arXiv
1612.03144). The data are read by `instances`.

Boxes are left, top, right and bottom, from the upper left corner of the first pixel; COCO's annotations
have width and height instead of the last two.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from res2net_zoo.tasks.base import Figures, Score, TaskModel, check_options
from res2net_zoo.tasks.drawing import draw_labels, run_lengths
from res2net_zoo.tasks.instances import Instances
from res2net_zoo.tasks.segmentation import voc_colour
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.private_apis import initLevelMapper

ASPECTS = (0.5, 1.0, 2.0)  # of anchors
LONGER = 1333 / 800  # maximum of an image's longer side relative to `img_size`, its shorter side, as in the papers
FIGURES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR", "AR_small", "AR_medium", "AR_large"),
)

VOC07 = "VOC07 AP"


class COCOFigures(Score):
    """COCO's average precision and recall in percent, computed by faster_coco_eval.

    If the data have masks, the metrics are those of the masks, and those of the boxes are named `box AP` and so on.
    Metrics without any object in the data, such as those of large objects, are omitted. Data in VOC's layout also
    have VOC07's average precision.
    """

    def __init__(self, data: Instances) -> None:
        self.data = data
        self.predictions: list[tuple[int, list[dict[str, Any]]]] = []
        self.found: list[dict[str, Any]] = []

    def update(self, i: int, target: dict[str, Any], prediction: dict[str, torch.Tensor]) -> None:
        """Add the objects that were detected in image `i`."""
        from faster_coco_eval.core import mask

        boxes = prediction["boxes"].double()
        boxes[:, 2:] -= boxes[:, :2]
        columns = zip(*(x.tolist() for x in (boxes, prediction["labels"], prediction["scores"].double())), strict=True)
        found = [{"image_id": i, "category_id": label, "bbox": box, "score": score} for box, label, score in columns]
        if self.data.masks:
            for one, pixels in zip(found, prediction["masks"], strict=True):
                one["segmentation"] = mask.encode(np.asfortranarray(pixels.numpy(), dtype=np.uint8))
        self.predictions.append((i, found))

    def compute(self, accelerator: Accelerator) -> Figures:
        """Return AP, AP50, AP75 and AR, AP and AR by object size, and VOC07's AP for VOC's layout."""
        self.found = [one for _, image in sorted(gather_object(self.predictions), key=lambda x: x[0]) for one in image]
        found = self.found
        if not self.data.masks:
            return self._figures("bbox", found)
        shapes = [{key: value for key, value in one.items() if key != "bbox"} for one in found]
        boxes = [{key: value for key, value in one.items() if key != "segmentation"} for one in found]
        of_boxes = {f"box {name}": value for name, value in self._figures("bbox", boxes).items()}
        return {**self._figures("segm", shapes), **of_boxes}

    def results(self) -> list[dict[str, Any]]:
        """Return the objects in COCO's results format, with the ids of the data.

        Objects of a class that is not in the data are omitted.
        """
        results = []
        for one in self.found:
            i, rle = one["image_id"], one.get("segmentation")
            if (category := self.data.category_ids[one["category_id"] - 1]) is None:
                continue
            if i in self.data.turns:
                bbox, rle = self.data.as_annotated(i, one["bbox"], rle)
                one = {**one, "bbox": bbox}
            ids = {"image_id": self.data.image_ids[i], "category_id": category}
            shape = {} if rle is None else {"segmentation": {**rle, "counts": rle["counts"].decode()}}
            results.append({**one, **ids, **shape})
        return results

    def _figures(self, kind: Any, found: list[dict[str, Any]]) -> Figures:
        from faster_coco_eval import COCO, COCOeval_faster

        annotations: list[dict[str, Any]] = []
        for i, instances in enumerate(self.data.instances):
            for instance in instances:
                about: dict[str, Any] = {} if instance.rle is None else {"segmentation": instance.rle}
                about |= {"category_id": instance.label, "bbox": instance.bbox, "area": instance.area}
                # COCO's code treats the id 0 as a missing annotation.
                about |= {"id": len(annotations) + 1, "image_id": i, "iscrowd": int(instance.crowd)}
                annotations.append(about)
        truth = COCO(
            {
                "images": [{"id": i, "width": w, "height": h} for i, (_, w, h) in enumerate(self.data.images)],
                "categories": [{"id": number, "name": name} for number, name in enumerate(self.data.classes, 1)],
                "annotations": annotations,
            }
        )
        # loadRes modifies its argument.
        measured = COCOeval_faster(truth, truth.loadRes([dict(one) for one in found]), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
        figures = zip(FIGURES, measured.all_stats, strict=False)
        shown = {name: 100 * float(value) for name, value in figures if value >= 0 and name not in ("AR1", "AR10")}
        if self.data.voc:
            shown[VOC07] = 100 * voc07_ap(self.data, found)
        return shown


def voc07_ap(data: Instances, found: list[dict[str, Any]]) -> float:
    """Return the mean over the classes of VOC07's average precision (Everingham et al., IJCV 2010, Section 4.2).

    A detection is matched with the object of its class that it overlaps most, at an IoU of at least 0.5. It is ignored
    if that object is difficult, and a false positive if a detection of a higher score has matched the object. This, and
    the interpolation at 11 recalls, differ from COCO's metric.

    Args:
        data: The annotated data.
        found: Detections in COCO's results format, with indices of images and classes instead of ids.
    """
    from faster_coco_eval.core import mask

    averages = []
    for label in sorted({one.label for instances in data.instances for one in instances if one.trained_on}):
        there = [[one for one in instances if one.label == label] for instances in data.instances]
        right, taken = [], set()
        for one in sorted((one for one in found if one["category_id"] == label), key=lambda one: -one["score"]):
            objects = there[one["image_id"]]
            overlaps = mask.iou([one["bbox"]], [other.bbox for other in objects], [0] * len(objects)) if objects else []
            best = int(np.argmax(overlaps)) if objects else 0
            if not objects or np.max(overlaps) < 0.5:
                right.append(False)
            elif objects[best].trained_on:
                right.append((one["image_id"], best) not in taken)
                taken.add((one["image_id"], best))
        hits = np.cumsum(right)
        recalls = hits / sum(other.trained_on for objects in there for other in objects)
        precisions = hits / np.arange(1, len(hits) + 1)
        highest = [precisions[recalls >= t / 10 - 1e-9].max(initial=0) for t in range(11)]
        averages.append(np.mean(highest))
    return float(np.mean(averages))


class Pyramid(nn.Module):
    """A backbone with a feature pyramid on its last levels, the finest of which is named "0".

    Args:
        backbone: timm's `features_only` model.
        finest: Maximum number of the backbone's levels to use.
        extended: Whether to add two coarser levels, as in RetinaNet, or one for anchors only.

    Attributes:
        strides: Strides of all levels, in pixels.
        out_channels: Channels of each level: 256, or fewer for a narrow backbone.
    """

    def __init__(self, backbone: Any, finest: int, extended: bool) -> None:
        super().__init__()
        self.backbone = backbone
        last = {stride: i for i, stride in enumerate(backbone.feature_info.reduction())}  # last level of each stride
        self.strides = sorted(last)[-finest:]
        self.levels = [last[stride] for stride in self.strides]
        channels = [backbone.feature_info.channels()[i] for i in self.levels]
        self.out_channels = min(256, channels[-1] // 4)
        more = LastLevelP6P7(self.out_channels, self.out_channels) if extended else LastLevelMaxPool()
        self.pyramid = FeaturePyramidNetwork(channels, self.out_channels, more)
        self.names = [str(level) for level in range(len(self.levels))]  # levels that boxes are pooled from
        for _ in range(2 if extended else 1):
            self.strides.append(2 * self.strides[-1])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the levels for images (N, 3, H, W), each (N, out_channels, H / stride, W / stride)."""
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        chosen = OrderedDict((name, features[i]) for name, i in zip(self.names, self.levels, strict=True))
        return self.pyramid(chosen)


def region_align(backbone: Pyramid, size: int) -> MultiScaleRoIAlign:
    """Return a RoIAlign that pools regions of `size` x `size` cells from the pyramid's levels.

    By default torchvision infers the levels' scales from the first image, which fails for small images.
    """
    pool = MultiScaleRoIAlign(backbone.names, size, 2)
    strides = backbone.strides[: len(backbone.names)]
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool


def full_precision(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Convert a module's outputs to float32, because torchvision's anchors and boxes take their dtype from them."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float()
    if isinstance(outputs, dict):
        return OrderedDict((name, full_precision(module, inputs, value)) for name, value in outputs.items())
    return type(outputs)(full_precision(module, inputs, value) for value in outputs)


class Detection(TaskModel):
    """Object detection, and instance segmentation with `maskrcnn`; `img_size` is an image's shorter side."""

    task = "detection"
    hub_task = "object-detection"
    heads = ("fasterrcnn", "retinanet", "maskrcnn")
    img_size = 800
    threshold = 0.5
    best = "AP"
    requires: ClassVar = ("faster-coco-eval",)

    @classmethod
    def open(cls, data: str, split: str, head: str, classes: Sequence[str] | None = None) -> Instances:
        """Open a folder in COCO's or VOC's layout."""
        return Instances(Path(data), split, head == "maskrcnn", classes)

    def build(self, features: Any, **kwargs: Any) -> nn.Module:
        """Build torchvision's network with `kwargs`.

        As in the papers, anchors have a side of 8 strides, or 4 to 6.3 strides in RetinaNet.
        """
        settings, number = self.settings, len(self.settings["classes"]) + 1
        if (stride := settings["output_stride"]) not in (None, 32):
            raise InputError(f"detection needs features of stride 32, not {stride}")
        kinds = {"retinanet": detection.RetinaNet, "maskrcnn": detection.MaskRCNN, "fasterrcnn": detection.FasterRCNN}
        kind: Any = kinds[settings["head"]]
        check_options(kind, kwargs)
        options: dict[str, Any] = {f"image_{key}": settings[key] for key in ("mean", "std")}
        options |= {"min_size": settings["img_size"], "max_size": round(settings["img_size"] * LONGER)}
        if settings["head"] == "retinanet":
            backbone = Pyramid(features, 3, extended=True)
            sizes = [tuple(int(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in backbone.strides]
            options["anchor_generator"] = AnchorGenerator(tuple(sizes), (ASPECTS,) * len(sizes))
            options["num_classes"] = number  # for the other networks, the predictors below set it
        else:
            backbone = Pyramid(features, 4, extended=False)
            width = backbone.out_channels
            anchors = AnchorGenerator(
                tuple((8 * stride,) for stride in backbone.strides), (ASPECTS,) * len(backbone.strides)
            )
            options |= {
                "rpn_anchor_generator": anchors,
                "box_roi_pool": region_align(backbone, 7),
                "box_head": TwoMLPHead(width * 7**2, 4 * width),
                "box_predictor": FastRCNNPredictor(4 * width, number),
            }
            if settings["head"] == "maskrcnn":
                options["mask_roi_pool"] = region_align(backbone, 14)
                options["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1)
                options["mask_predictor"] = MaskRCNNPredictor(width, width, number)
        network = kind(backbone, **{**options, **kwargs})
        if settings["head"] == "retinanet":
            heads = [network.head]
        else:
            heads = [network.rpn.head, network.roi_heads.box_predictor]
            heads += [network.roi_heads.mask_predictor] if settings["head"] == "maskrcnn" else []
        for module in (backbone, *heads):
            module.register_forward_hook(full_precision)
        return network

    @property
    def features(self) -> nn.Module:
        """The backbone below the pyramid."""
        network: Any = self.network
        return network.backbone.backbone

    def transform(self, image: Image.Image, target: dict[str, Any], train: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """Mirror half of the images in training; torchvision's networks resize and normalize them."""
        pixels = TF.to_dtype(TF.pil_to_tensor(image), scale=True)
        if train and torch.rand(()) < 0.5:
            pixels, boxes = pixels.flip(2), target["boxes"].clone()
            boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
            target = {**target, "boxes": boxes}
            if "masks" in target:
                target["masks"] = target["masks"].flip(2)
        return pixels, target

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """Return the losses, or the objects of each image on the CPU, sorted by descending score.

        Objects are `boxes` (N, 4) in pixels of the image, `labels` (N,) from 1, `scores` (N,) and, with Mask R-CNN,
        boolean `masks` (N, H, W).

        Raises:
            InputError: An image is so narrow that it would be resized to less than a pixel.
        """
        for height, width in (image.shape[1:] for image in images):
            if LONGER * self.settings["img_size"] * min(height, width) < max(height, width):
                raise InputError(f"an image of {width} x {height} is too narrow: resizing leaves less than a pixel")
        if targets is not None and self.training:
            return self.network(images, targets)
        # One image at a time: batch padding would change the result.
        return [self._found(image) for image in images]

    def _found(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        (found,) = self.network([image])
        if "masks" in found:
            found["masks"] = found["masks"][:, 0] > 0.5
        return {name: value.cpu() for name, value in found.items()}

    def score(self, data: Any) -> COCOFigures:
        """Return COCO's metrics."""
        return COCOFigures(data)

    def draw(self, image: Image.Image, prediction: Any, threshold: float | None = None) -> Image.Image:
        """Draw boxes with classes and scores, and masks, in VOC's colours, the highest scores on top."""
        kept = self.confident(prediction, threshold)
        numbers = kept["labels"].tolist()
        if not numbers:
            return image.copy()
        labels = [
            f"{self.settings['classes'][number - 1]} {score:.2f}"
            for number, score in zip(numbers, kept["scores"].tolist(), strict=True)
        ]
        colours = [voc_colour(number) for number in numbers]
        drawn = TF.pil_to_tensor(image)
        if "masks" in kept:
            masks = kept["masks"] & (kept["masks"].cumsum(0) == 1)  # torchvision draws overlaps of masks in black
            drawn = draw_segmentation_masks(drawn, masks, alpha=0.5, colors=list(colours))
        picture = TF.to_pil_image(draw_bounding_boxes(drawn, kept["boxes"].flip(0), width=2, colors=colours[::-1]))
        draw_labels(picture, kept["boxes"].tolist(), labels, colours)
        return picture

    def to_records(self, prediction: Any, threshold: float | None = None) -> list[dict[str, Any]]:
        """Return each object's `label`, `score`, `bbox` (left, top, width, height) and, with masks, `segmentation`."""
        kept = self.confident(prediction, threshold)
        objects: list[dict[str, Any]] = []
        for i, (left, top, right, bottom) in enumerate(kept["boxes"].tolist()):
            label, score = self.settings["classes"][int(kept["labels"][i]) - 1], float(kept["scores"][i])
            objects.append({"label": label, "score": score, "bbox": [left, top, right - left, bottom - top]})
            if "masks" in kept:
                objects[-1]["segmentation"] = run_lengths(kept["masks"][i])
        return objects

    def confident(self, prediction: dict[str, torch.Tensor], threshold: float | None) -> dict[str, torch.Tensor]:
        """Return the objects of a prediction with scores of at least the threshold, by default the task's."""
        least = self.threshold if threshold is None else threshold
        return {name: value[prediction["scores"] >= least] for name, value in prediction.items()}
