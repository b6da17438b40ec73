"""Draw class activation maps of one or more models side by side.

Usage: res2net-zoo cam IMAGE ... [--model NAME ...] [--class NAME ...] [--output FILE]

Each model uses its own preprocessing. Without --model, the shipped digits model is used.

Examples:
  res2net-zoo cam dog.jpg --model res2net50_26w_4s resnet50 --output figure4.png
  res2net-zoo cam photos/ --model res2net101d --class "tabby, tabby cat" --method layercam
  res2net-zoo cam photos/ --model res2net101d --backend auto

Exit codes: 0 done; 2 bad input.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import (
    IMAGES,
    INT8,
    MODEL,
    add_backend,
    add_calibrate,
    add_machine,
    autocast_precision,
    check_calibrate,
    check_int8,
)
from res2net_zoo.cli.shipped import shipped_data, shipped_model

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

METHODS = {  # classes of the grad-cam package
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help=IMAGES)
    add("--model", nargs="+", default=[shipped_model()], help=MODEL)
    add(
        "--class",
        nargs="+",
        dest="classes",
        help="name or index of the class: one for all images, or one for each (default: the first model's top-1)",
    )
    add("--method", choices=METHODS, default="gradcam", help="method of the grad-cam package (default: %(default)s)")
    add("--output", type=Path, default=Path("cam.png"), help="picture to write (default: %(default)s)")
    add_machine(add, workers=False, int8=True)
    add_backend(add, None, "auto for int8, else torch; others than torch need one linear layer after pooling")
    add_calibrate(add, "the shipped digits for the shipped model")
    args = parser.parse_args(argv)
    check_int8(parser, args)
    check_calibrate(parser, args, shipped_data() if args.model == [shipped_model()] else None)
    args.backend = args.backend or "torch"
    if args.backend != "torch" and args.method != "gradcam":
        parser.error(f"--method {args.method} needs plain PyTorch; remove --backend and --precision")
    if args.backend == "torch" and args.mixed_precision not in (None, "no"):
        parser.error("plain PyTorch computes activation maps in float32; add --backend auto or remove --precision")
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.analysis import cam
    from res2net_zoo.data.images import find_images
    from res2net_zoo.data.labels import class_names
    from res2net_zoo.utils.console import progress_bar
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_writable
    from res2net_zoo.utils.markdown import markdown_table
    from res2net_zoo.utils.processes import start_processes
    from res2net_zoo.weights.pretrained import create_model

    cam.require()
    accelerator = start_processes(args.threads, autocast_precision(args))
    if accelerator.num_processes > 1:
        raise InputError("a picture is drawn by one process; start this without accelerate launch")
    paths = find_images(args.images)
    if args.classes and len(args.classes) not in (1, len(paths)):
        raise InputError(f"there are {len(paths)} images and {len(args.classes)} classes; give one class or as many")
    if args.output.resolve() in [Path(path).resolve() for path in paths]:
        raise InputError(f"--output {args.output} is one of the images, which the picture would replace")
    check_writable(args.output.resolve().parent)
    cam.check_format(args.output)

    models: list[Any] = []
    for name in args.model:
        model: Any = create_model(name).eval().to(accelerator.device)
        if not model.num_classes:
            raise InputError(f"{name} has no classifier")
        if class_names(model) != class_names(models[0] if models else model):
            raise InputError(f"{name} and {args.model[0]} have different classes; choose models with the same classes")
        models.append(model)
    names = class_names(models[0])
    wanted = classes_of(args.classes or (), names)
    wanted = wanted * len(paths) if len(wanted) == 1 else wanted

    explain = explanation(args, accelerator)
    rows, scores = [], []
    for i, path in enumerate(progress_bar(accelerator, paths, desc="cam", unit="image")):
        index = wanted[i] if wanted else None
        seen = []
        for name, model in zip(args.model, models, strict=True):
            image = cam.load_image(model, path)
            heat, logits, index = explain(model, image.to(accelerator.device), index)
            score = float(logits.float().softmax(1)[0, index])
            seen.append(cam.Activation(name.rpartition("/")[2], cam.picture(model, image), heat, score))
        assert index is not None
        rows.append((Path(path).name, names[index], seen))
        scores.append((path, names[index], *(f"{100 * one.score:.1f}" for one in seen)))
    cam.draw(rows, args.output)
    print(markdown_table(("image", "class", *(f"{one.model} (percent)" for one in rows[0][2])), scores))
    print(f"wrote {args.output}")
    return 0


# Maps a model, an image (1, C, H, W) and a class, or None for the top-1, to the map (H, W), the logits, and the class.
Explain = Callable[[Any, "torch.Tensor", int | None], tuple[Any, "torch.Tensor", int]]


def explanation(args: argparse.Namespace, accelerator: "Accelerator") -> Explain:
    """Return a function that computes an activation map, by gradients or from the last map of a backend."""
    import torch

    from res2net_zoo.analysis import cam
    from res2net_zoo.inference.calibration import calibration_images
    from res2net_zoo.inference.forward import accelerate_features

    def by_gradients(model: Any, image: torch.Tensor, index: int | None) -> tuple[Any, torch.Tensor, int]:
        if index is None:
            with torch.inference_mode():
                index = int(model(image).argmax())
        heat, logits = cam.activation_maps(model, image, [index], METHODS[args.method])
        return heat[0], logits, index

    if args.backend == "torch":
        return by_gradients
    last: dict[Any, cam.LastMap] = {}

    def by_backend(model: Any, image: torch.Tensor, index: int | None) -> tuple[Any, torch.Tensor, int]:
        if model not in last:
            cam.check_linear_head(model, image)
            last[model] = cam.LastMap(model).eval()
            images = calibration_images(model, args.calibrate) if args.mixed_precision == INT8 else None
            accelerate_features(last[model], args.backend, accelerator, images)
        with torch.inference_mode():
            features = last[model](image)
            logits = model.forward_head(features)
        index = int(logits.argmax()) if index is None else index
        return cam.class_maps(model, features, [index], image.shape[2:])[0], logits, index

    return by_backend


def classes_of(words: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the classes that words name; of many, an error names the command that lists them."""
    from res2net_zoo.analysis import cam
    from res2net_zoo.utils.errors import InputError

    try:
        return [cam.find_class(word, names) for word in words]
    except InputError as error:
        if len(names) <= cam.LISTED:
            raise
        raise InputError(f"{error}; `res2net-zoo predict --topk {len(names)}` lists them") from error
