"""Predict objects, masks, keypoints or saliency, and save a picture and a JSON file per image.

Usage: res2net-zoo predict-task NAME IMAGE ... --output DIR [--threshold T] [--detector NAME]

NAME is a folder written by `res2net-zoo train-task`, local-dir:DIR or hf-hub:ORG/NAME. For each image, it writes to DIR
a PNG with boxes, masks or keypoints, or the saliency map, and a JSON file with the path of the image, the classes and
the objects: labels, scores, boxes (left, top, width, height in pixels), keypoints, and masks in COCO's run-length
encoding. Keypoint models expect one person that fills the image; with --detector, keypoints are predicted for each
person detected by another model.

Examples:
  res2net-zoo predict-task outputs/voc street.jpg --output drawn
  res2net-zoo predict-task outputs/voc photos/ --output drawn --backend auto
  res2net-zoo predict-task outputs/keypoints 'photos/*.jpg' --detector outputs/persons --output drawn

Exit codes: 0 done; 2 bad input.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import (
    IMAGES,
    INT8,
    add_backend,
    add_machine,
    autocast_precision,
    check_calibrate,
    check_int8,
)
from res2net_zoo.utils.command_line import within

if TYPE_CHECKING:
    from accelerate import Accelerator


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", metavar="NAME", help="folder, local-dir:DIR or hf-hub:ORG/NAME")
    add("images", nargs="+", metavar="IMAGE", help=IMAGES)
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the pictures and JSON files")
    about = "minimum score of an object or keypoint, from 0 to 1 (default: 0.5 for detection, 0.2 for keypoints)"
    add("--threshold", type=within(float, 0, 1), metavar="T", help=about)
    add("--detector", help="detection model for the persons whose keypoints are predicted")
    add_machine(add, workers=False, int8=True)
    add_backend(add, None, "torch; auto for int8", what="backbone")
    add("--calibrate", metavar="DATA", help="images that calibrate an int8 backbone: a folder or a quoted pattern")
    args = parser.parse_args(argv)
    check_int8(parser, args)
    check_calibrate(parser, args)
    args.backend = args.backend or "torch"
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.data.images import find_images
    from res2net_zoo.tasks.keypoints import boxes_of
    from res2net_zoo.tasks.prediction import predict
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_can_make, check_writable, temporary_file
    from res2net_zoo.utils.processes import start_processes

    accelerator = start_processes(args.threads, autocast_precision(args))
    if accelerator.num_processes > 1:
        raise InputError("pictures are drawn by one process; start this without accelerate launch")
    paths = [Path(path) for path in find_images(args.images)]
    outputs = [args.output / f"{path.stem}.png" for path in paths]
    if len(set(outputs)) < len(outputs):
        raise InputError(
            "some images have the same name, and so would their pictures; use a separate --output for each"
        )
    if {path.resolve() for path in outputs} & {path.resolve() for path in paths}:
        raise InputError(f"--output {args.output} contains some of the images, which the pictures would replace")
    (check_writable if args.output.is_dir() else check_can_make)(args.output)
    model = load_model(args.model, args, accelerator)
    if args.threshold is not None and model.threshold is None:
        raise InputError(f"--threshold is for detection and keypoints; predictions of {model.task} have no scores")
    boxes = None
    if args.detector is not None:
        if model.task != "keypoints":
            raise InputError(f"--detector is for keypoints; the task of {args.model} is {model.task}")
        boxes = partial(boxes_of, load_model(args.detector, args, accelerator))
    args.output.mkdir(parents=True, exist_ok=True)
    predictions = predict(model, paths, accelerator, args.threshold, boxes)
    for (picture, record), output in zip(predictions, outputs, strict=True):
        with temporary_file(output) as temporary:
            picture.save(temporary, "PNG")
        with temporary_file(output.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record) + "\n")
    print(f"{len(outputs)} pictures and JSON files in {args.output}")
    return 0


def load_model(name: str, args: argparse.Namespace, accelerator: "Accelerator") -> Any:
    """Return a task's model on the accelerator's device, whose backbone runs by a backend."""
    import torch

    from res2net_zoo.data.images import find_images
    from res2net_zoo.inference.forward import accelerate_features
    from res2net_zoo.tasks import load
    from res2net_zoo.tasks.prediction import calibration_crops

    model: Any = load(name)
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    images = None
    if args.mixed_precision == INT8:
        images = calibration_crops(model, [Path(path) for path in find_images([args.calibrate])], accelerator)
    accelerate_features(model.features, args.backend, accelerator, images)
    return model
