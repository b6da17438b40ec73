"""Prediction of a task's model for image files: a picture and a JSON record per image."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image

from res2net_zoo.data.images import open_image
from res2net_zoo.tasks.base import NO_IMAGE, TaskModel, reason
from res2net_zoo.tasks.upright import to_rgb
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError


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
        try:
            with open_image(path) as file:
                image = to_rgb(file)
        except NO_IMAGE as error:
            raise InputError(f"cannot decode {path}: {reason(error, path)}") from error
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
