"""Export a model to ONNX or OpenVINO, and check it against PyTorch on real images.

Usage: res2net-zoo export --model NAME --format onnx|openvino --output FILE

The file is written only if its outputs in ONNX Runtime or OpenVINO match those of PyTorch, on the shipped digits or on
--images. Its batch size is dynamic, its image size that of the model; preprocessing and class names are stored as
metadata.

Examples:
  res2net-zoo export --model res2net50d --format onnx --output res2net50d.onnx
  res2net-zoo export --model local-dir:outputs/mine --format openvino --output mine.xml --images 'photos/*.jpg'

Exit codes: 0 done; 1 the outputs differ, and nothing is written; 2 bad input.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import IMAGES, MODEL
from res2net_zoo.cli.shipped import shipped_data, shipped_model
from res2net_zoo.utils.command_line import within

if TYPE_CHECKING:
    from res2net_zoo.inference.export import Exported

CHECKED = 16  # number of images, evenly spaced over all


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", default=shipped_model(), help=MODEL)
    add("--format", required=True, choices=("onnx", "openvino"), help="file format")
    add("--output", required=True, type=Path, help="file.onnx, or file.xml with the weights in file.bin")
    add(
        "--img-size",
        type=within(int, 1, 4096),
        help="height and width of the images in pixels (default: the model's own)",
    )
    add("--batch-size", type=within(int, 1), help="fix the number of images of a batch (default: any number)")
    add(
        "--opset",
        type=within(int, 1),
        help="version of the ONNX operators (default: 18, supported by runtimes since 2023)",
    )
    add(
        "--precision",
        choices=("float32", "float16"),
        help="precision of the weights in an OpenVINO file (default: float32)",
    )
    add("--images", nargs="+", metavar="IMAGE", help=f"check on these {IMAGES} (default: the shipped digits)")
    args = parser.parse_args(argv)
    if args.format != "onnx" and args.opset is not None:
        parser.error("--opset needs --format onnx")
    if args.format != "openvino" and args.precision == "float16":
        parser.error("--precision float16 needs --format openvino")
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    import datasets

    from res2net_zoo.data.images import find_images
    from res2net_zoo.data.sources import open_source
    from res2net_zoo.inference.export import (
        NEEDS,
        OPSET,
        CheckError,
        check_output,
        export,
        export_metadata,
        load_images,
        require,
    )
    from res2net_zoo.utils.console import report
    from res2net_zoo.utils.files import check_writable
    from res2net_zoo.weights.pretrained import create_model
    from res2net_zoo.weights.provenance import of_model

    require(*NEEDS[args.format])
    check_output(args.output, args.format)
    check_writable(args.output.resolve().parent)
    model: Any = create_model(args.model).eval()
    origin = of_model(args.model, model.pretrained_cfg)
    rows: Any
    if args.images:
        rows = [{"image": {"bytes": None, "path": path}} for path in find_images(args.images)]
    else:
        datasets.disable_progress_bars()
        rows = open_source(shipped_data()).rows
    number = min(CHECKED, len(rows))
    images = load_images(model, [rows[i * len(rows) // number] for i in range(number)], args.img_size)
    try:
        exported = export(
            model,
            images,
            args.output,
            args.format,
            batch_size=args.batch_size,
            opset=args.opset or OPSET,
            precision=args.precision or "float32",
            facts=export_metadata(model, args.model, args.img_size, origin),
        )
    except CheckError as error:
        report(error)
        return 1
    print(summary(exported, len(rows)))
    return 0


def summary(exported: "Exported", available: int) -> str:
    """Return the printed summary of an export."""
    batches = " and ".join(map(str, exported.batches))
    of = f" of {available}" if available > exported.images else ""
    lines = {
        "file": f"{exported.path} ({exported.size / 2**20:.1f} MiB, {exported.version})",
        "input": exported.inputs,
        "output": exported.outputs,
        "checked": f"in {exported.runtime} against PyTorch, on {exported.images}{of} images in batches of {batches}",
        "error": f"{exported.error:.1e} of the largest value",
    }
    if exported.same_top1 is not None:
        lines["top-1"] = f"the same for {exported.same_top1} of {exported.images}"
    return "\n".join(f"{key:8} {value}" for key, value in lines.items())
