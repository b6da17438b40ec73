"""Write a model to an ONNX or OpenVINO file that runs without PyTorch, and check it on real images.

Usage: python scripts/export.py --model NAME --format onnx|openvino --output FILE

The file takes its place only if ONNX Runtime or OpenVINO computes from it what PyTorch computes, on
digits that the repository ships or on --images of your own. It is for any number of images at once, of
the model's own size, and carries the preprocessing and the names of the classes.

Exit codes: 0 done; 1 what the file computes is something else, and nothing was written; 2 bad input.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import SHIPPED_DATA, SHIPPED_MODEL, Parser, within

if TYPE_CHECKING:
    from res2net_zoo.inference.export import Exported

CHECKED = 16  # images; those of a folder with more are taken at even distances


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = f"local-dir:{os.path.relpath(SHIPPED_MODEL)}"
    add("--model", default=default, metavar="NAME", help="what timm.create_model takes (%(default)s)")
    add("--format", required=True, choices=("onnx", "openvino"), help="what to write")
    add("--output", required=True, type=Path, metavar="FILE", help=".onnx, or .xml with a .bin beside it")
    add("--img-size", type=within(int, 1, 4096), metavar="N", help="height and width of the images (the model's own)")
    add("--batch-size", type=within(int, 1), metavar="N", help="make it for N images at once; default any number")
    add("--opset", type=within(int, 1), metavar="N", help="of ONNX's operators (18, which runtimes since 2023 read)")
    add("--precision", choices=("float32", "float16"), help="of an OpenVINO file's weights (float32)")
    add("--images", nargs="+", metavar="IMAGE", help="files, folders or patterns to check it on; default our digits")
    args = parser.parse_args()
    if args.format != "onnx" and args.opset is not None:
        parser.error("--opset is ONNX's; leave it out with --format openvino")
    if args.format != "openvino" and args.precision == "float16":
        parser.error("--precision float16 needs --format openvino")
    return args


def main(args: argparse.Namespace) -> int:
    import datasets

    from res2net_zoo.data.images import find_images
    from res2net_zoo.data.sources import open_source
    from res2net_zoo.inference.export import (
        NEEDS,
        OPSET,
        CheckError,
        check_output,
        describe,
        export,
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
        rows = open_source(os.path.relpath(SHIPPED_DATA)).rows
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
            facts=describe(model, args.model, args.img_size, origin),
        )
    except CheckError as error:
        report(error)
        return 1
    print(summary(exported, len(rows)))
    return 0


def summary(exported: "Exported", available: int) -> str:
    """Return what was written and found, in a few lines."""
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


if __name__ == "__main__":
    arguments = parse_args()

    from res2net_zoo.utils.console import run

    sys.exit(run(lambda: main(arguments)))
