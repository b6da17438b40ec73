"""Prediction of a task's model for image files: a picture and a JSON record per image."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from torchvision.transforms.v2.functional import center_crop

from res2net_zoo.data.images import open_image
from res2net_zoo.inference.quantization import CALIBRATION_IMAGES, evenly_spaced
from res2net_zoo.tasks.base import NO_IMAGE, TaskModel, reason
from res2net_zoo.tasks.upright import to_rgb
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError

CROP = 224  # largest height and width of calibration images


def read_image(path: Path) -> Image.Image:
    """Read an image in RGB, upright.

    Raises:
        InputError: It cannot be decoded.
    """
    try:
        with open_image(path) as file:
            return to_rgb(file)
    except NO_IMAGE as error:
        raise InputError(f"cannot decode {path}: {reason(error, path)}") from error


class _Reached(Exception):
    """Ends a forward pass at the backbone."""


@torch.no_grad()
def calibration_crops(model: TaskModel, paths: Sequence[Path], accelerator: Accelerator) -> torch.Tensor:
    """Return centre crops of the inputs of a model's backbone, for the calibration of int8.

    They are cropped, because tasks resize images to many sizes, but not rescaled.

    Args:
        model: The model.
        paths: Paths of images; at most 300, evenly spaced, are used.
        accelerator: The accelerator.

    Returns:
        Images (N, 3, H, W), normalized; H and W are at most 224.

    Raises:
        InputError: An image cannot be decoded, or the model does not support it.
    """
    crops: list[torch.Tensor] = []

    def take(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        images = inputs[0][:1].float().cpu()
        crops.append(center_crop(images, [min(CROP, side) for side in images.shape[2:]]))
        raise _Reached

    chosen = [paths[i] for i in evenly_spaced(len(paths), CALIBRATION_IMAGES)]
    handle = model.features.register_forward_pre_hook(take)
    try:
        for path in progress_bar(accelerator, chosen, desc="calibrate", unit="image"):
            images, _ = model.collate([model.transform(read_image(path), {}, False)])
            with contextlib.suppress(_Reached):
                model(send_to_device(images, accelerator.device))
    finally:
        handle.remove()
    size = [min(crop.shape[side] for crop in crops) for side in (2, 3)]
    return torch.cat([center_crop(crop, size) for crop in crops])


def predict(
    model: TaskModel,
    paths: Sequence[Path],
    accelerator: Accelerator,
    threshold: float | None = None,
    boxes: Callable[[Image.Image], Sequence[Sequence[float]]] | None = None,
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Yield a picture and a record of a model's prediction for each image.

    Args:
        model: The model.
        paths: Paths of the images.
        accelerator: The accelerator.
        threshold: Lowest score that is drawn, from 0 to 1; None for the task's default.
        boxes: Returns left, top, width and height of each object, for models that process one object at a time.

    Yields:
        The picture, and a dict for JSON: `image` (path), `width`, `height`, `task`, `classes`, `threshold` (if
        predictions have scores) and `objects`, as `TaskModel.to_records` returns them.

    Raises:
        InputError: An image cannot be decoded, or the model does not support it.
    """
    threshold = model.threshold if threshold is None else threshold
    for path in progress_bar(accelerator, paths, desc="predict", unit="image"):
        image = read_image(path)
        drawn, objects = image.copy(), []
        try:
            for target in [{}] if boxes is None else [{"box": box} for box in boxes(image)]:
                images, _ = model.collate([model.transform(image, target, False)])
                with torch.inference_mode(), accelerator.autocast():
                    (prediction,) = model(send_to_device(images, accelerator.device))
                drawn = model.draw(drawn, prediction, threshold)
                found = model.to_records(prediction, threshold)
                objects += [{**one, "bbox": list(target["box"])} if target else one for one in found]
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        record = {"image": str(path), "width": image.width, "height": image.height, "task": model.task}
        record |= {"classes": list(model.settings["classes"])}
        record |= {} if threshold is None else {"threshold": threshold}
        yield drawn, {**record, "objects": objects}
