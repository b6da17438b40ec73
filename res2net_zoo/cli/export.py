"""Export a model to ONNX or OpenVINO, and check it against PyTorch on real images.

Usage: res2net-zoo export --model NAME --format onnx|openvino --output FILE
       res2net-zoo export --precision int8 --calibrate DATA --model NAME --format onnx|openvino --output FILE

The file is written only if its outputs in ONNX Runtime or OpenVINO match those of PyTorch, on the shipped digits or on
--images. Its batch size is dynamic, its image size that of the model; preprocessing and class names are stored as
metadata.

With --precision int8 the model is quantized: images of DATA calibrate it, and the loss of accuracy is measured on
others, written into the metadata and into a card next to the file, and printed. DATA is a Hub dataset id, a folder of
class folders, or local Parquet, Arrow or WebDataset files: its training split calibrates and its validation or test
split measures, or evenly spaced images of its only split calibrate and the others measure.

Examples:
  res2net-zoo export --model res2net50d --format onnx --output res2net50d.onnx
  res2net-zoo export --model local-dir:outputs/mine --format openvino --output mine.xml --images 'photos/*.jpg'
  res2net-zoo export --precision int8 --calibrate photos --model local-dir:mine --format onnx --output mine-int8.onnx

Exit codes: 0 done; 1 the outputs differ or int8 loses more than --max-loss, and nothing is written; 2 bad input.
"""

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import IMAGES, MODEL
from res2net_zoo.cli.shipped import shipped_data, shipped_model
from res2net_zoo.utils.command_line import within

if TYPE_CHECKING:
    from res2net_zoo.inference.calibration import Selection
    from res2net_zoo.inference.export import Exported
    from res2net_zoo.inference.int8_export import QuantizedExport

MAX_LOSS = 1.0  # percentage points
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
    add("--batch-size", type=within(int, 1), help="fixed batch size (default: dynamic)")
    add(
        "--opset",
        type=within(int, 1),
        help="ONNX opset (default: 18, supported by runtimes since 2023)",
    )
    add(
        "--precision",
        choices=("float32", "float16", "int8"),
        help="float16 stores the weights of an OpenVINO file in float16, int8 quantizes the model (default: float32)",
    )
    add("--images", nargs="+", metavar="IMAGE", help=f"check on these {IMAGES} (default: the shipped digits)")
    quantized = parser.add_argument_group("int8").add_argument
    quantized(
        "--calibrate",
        metavar="DATA",
        help="labelled images for calibration and for measuring the loss (default for the shipped model: the shipped "
        "digits)",
    )
    quantized("--label-column", help="label column of DATA, if ambiguous")
    about = f"maximum loss of top-1 in percentage points; above it nothing is written (default: {MAX_LOSS})"
    quantized("--max-loss", type=within(float, 0, 100), help=about)
    quantized("--force", action="store_true", help="write the file even if it loses more")
    args = parser.parse_args(argv)
    if args.format != "onnx" and args.opset is not None:
        parser.error("--opset needs --format onnx")
    if args.format != "openvino" and args.precision == "float16":
        parser.error("--precision float16 needs --format openvino")
    check_int8(parser, args)
    return args


def check_int8(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the options of int8, and set the calibration images of the shipped model."""
    given = {"--calibrate": args.calibrate, "--label-column": args.label_column, "--max-loss": args.max_loss}
    if args.precision != "int8":
        for name, value in (given | {"--force": args.force or None}).items():
            if value is not None:
                parser.error(f"{name} needs --precision int8")
        return
    if args.images:
        parser.error("--images is for files that are not quantized; with int8, images of --calibrate check the file")
    if args.calibrate is None and args.model == shipped_model():
        args.calibrate = shipped_data()
    if args.calibrate is None:
        parser.error("--precision int8 needs --calibrate DATA, labelled images as those that the model is for")


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    import datasets

    from res2net_zoo.inference.export import EXPORT, NEEDS, CheckError, check_output, export_metadata
    from res2net_zoo.utils.console import report
    from res2net_zoo.utils.files import check_writable
    from res2net_zoo.utils.packages import require
    from res2net_zoo.weights.pretrained import create_model
    from res2net_zoo.weights.provenance import of_model

    require(*EXPORT, *NEEDS[args.format])
    check_output(args.output, args.format, args.precision or "float32")
    check_writable(args.output.resolve().parent)
    model: Any = create_model(args.model).eval()
    facts = export_metadata(model, args.model, args.img_size, of_model(args.model, model.pretrained_cfg))
    datasets.disable_progress_bars()
    try:
        print((export_quantized if args.precision == "int8" else export_float)(args, model, facts))
    except CheckError as error:
        report(error)
        return 1
    return 0


def export_float(args: argparse.Namespace, model: Any, facts: dict[str, str]) -> str:
    """Export a model in float32 or float16; return the printed summary."""
    from res2net_zoo.data.images import find_images
    from res2net_zoo.data.sources import open_source
    from res2net_zoo.inference.export import OPSET, export, load_images
    from res2net_zoo.inference.quantization import evenly_spaced

    rows: Any
    if args.images:
        rows = [{"image": {"bytes": None, "path": path}} for path in find_images(args.images)]
    else:
        rows = open_source(shipped_data()).rows
    images = load_images(model, [rows[i] for i in evenly_spaced(len(rows), CHECKED)], args.img_size)
    exported = export(
        model,
        images,
        args.output,
        args.format,
        batch_size=args.batch_size,
        opset=args.opset or OPSET,
        precision=args.precision or "float32",
        facts=facts,
    )
    return summary(exported, len(rows))


def export_quantized(args: argparse.Namespace, model: Any, facts: dict[str, str]) -> str:
    """Export a model in int8; return the printed summary."""
    from res2net_zoo.inference.calibration import calibration_and_held_out
    from res2net_zoo.inference.export import OPSET
    from res2net_zoo.inference.int8_export import export_int8
    from res2net_zoo.inference.quantization import MINIMUM
    from res2net_zoo.utils.console import warn

    calibration, held_out = calibration_and_held_out(args.calibrate, MINIMUM, args.label_column)
    if held_out.source.skipped:
        warn(f"skipped in {args.calibrate}: {held_out.source.skipped}")
    with reporting_warnings():
        exported = export_int8(
            model,
            calibration,
            held_out,
            args.output,
            args.format,
            facts=facts,
            batch_size=args.batch_size,
            opset=args.opset or OPSET,
            img_size=args.img_size,
            max_loss=MAX_LOSS if args.max_loss is None else args.max_loss,
            force=args.force,
        )
    return quantized_summary(exported, calibration, held_out)


@contextlib.contextmanager
def reporting_warnings() -> Iterator[None]:
    """Report the warnings about calibration images as lines of the program, and ignore those of libraries."""
    from res2net_zoo.utils.console import warn

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                if "calibration images" in str(warning.message):
                    warn(warning.message, "calibrate")


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


def quantized_summary(exported: "QuantizedExport", calibration: "Selection", held_out: "Selection") -> str:
    """Return the printed summary of an export in int8."""
    from res2net_zoo.inference.quantized_card import LABELS

    file, measured = exported.file, exported.measured
    kept = file.float_layers
    lines = {
        "file": f"{file.path} ({exported.size / 2**20:.1f} MiB, {file.version}, {file.precision})",
        "card": exported.card,
        "layers": f"{len(file.layers) - len(kept)} of {len(file.layers)} in int8",
        "in float": ", ".join([*kept, *json.loads(file.metadata["float_norms"])]) or "none",
        "checked": f"in float32 against PyTorch, on {exported.checked} images: error {exported.error:.1e}",
        "calibrated": f"on {calibration}",
        "measured": f"in {file.metadata['runtime']}, on {held_out}",
    }
    for key, label in LABELS.items():
        if f"{key}_int8" in file.metadata:
            before, after, loss = (file.metadata[f"{key}_{what}"] for what in ("float32", "int8", "loss"))
            lines[label] = f"float32 {before} %, int8 {after} %: loss {loss} points"
    lines["same top-1"] = f"for {measured.same_top1} of {measured.images}"
    lines["versions"] = ", ".join(f"{k} {v}" for k, v in json.loads(file.metadata["versions"]).items())
    return "\n".join(f"{key:10} {value}" for key, value in lines.items())
