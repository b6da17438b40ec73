"""Measure the accuracy of models, and compare it with the published one.

Usage: res2net-zoo validate [--model NAME ...] [--data SRC] [--check]

Without --model and --data, the shipped model is measured on the shipped digits. Every image is counted exactly once,
on any number of processes.

NAME is a model name as for timm.create_model: arch, arch.tag, local-dir:DIR or hf-hub:ORG/NAME; or `all` for every
checkpoint of the catalogue. SRC is a Hub dataset id, a folder of class folders, or local Parquet, Arrow or WebDataset
files.

Examples:
  res2net-zoo validate
  res2net-zoo validate --model res2net50_26w_4s res2net101d --data /data/imagenet/val --check
  res2net-zoo validate --processes 8 --model all --data ILSVRC/imagenet-1k --streaming --output results.json

Exit codes: 0 done; 1 --check found an accuracy that differs from the published one, or --skip-corrupt skipped images;
2 bad input. `accelerate launch` turns every failure into 1.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import (
    INT8,
    PRECISIONS,
    PROFILE,
    SKIP_CORRUPT,
    add_backend,
    add_batch_size,
    add_calibrate,
    add_machine,
    autocast_precision,
    check_int8,
)
from res2net_zoo.cli.shipped import as_in_clone, shipped_data, shipped_model
from res2net_zoo.utils.command_line import within

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from res2net_zoo.catalog import Accuracy
    from res2net_zoo.data.sources import Source
    from res2net_zoo.evaluation import Counts


PRECISION_NAMES = {name: torch_name for torch_name, name in PRECISIONS.items()} | {INT8: INT8}


OPTIONS = ("benchmark", "label_column", "skip_corrupt", "backend", "calibrate")  # that change a result


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    what = parser.add_argument_group("models and data")
    what.add_argument(
        "--model",
        nargs="+",
        default=[shipped_model()],
        help="models, or `all` (default: %(default)s)",
    )
    what.add_argument("--data", metavar="SRC", default=shipped_data(), help="labelled images (default: %(default)s)")
    what.add_argument("--split", help="split of the data (default: validation, else test, else the only one)")
    what.add_argument("--label-column", help="label column, if ambiguous")
    what.add_argument(
        "--benchmark",
        choices=("imagenet-1k", "imagenet-real", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch"),
        help="ImageNet benchmark of the data (default: recognized by its classes and size); "
        "imagenet-real uses the labels of ImageNet-ReaL, by file name",
    )
    how = parser.add_argument_group("how")
    add_batch_size(how.add_argument, 64)
    add_machine(how.add_argument, int8=True)
    add_backend(how.add_argument, None, "torch, the reference; auto for int8")
    add_calibrate(how.add_argument, "that of --data")
    how.add_argument("--streaming", action="store_true", help="stream the images without caching them")
    how.add_argument("--skip-corrupt", action="store_true", help=SKIP_CORRUPT)
    how.add_argument("--profile", action="store_true", help=PROFILE)
    result = parser.add_argument_group("output")
    result.add_argument("--check", action="store_true", help="fail if a top-1 or top-5 differs from the published one")
    result.add_argument(
        "--tolerance",
        type=within(float, 0),
        default=0.1,
        help="permitted difference in percentage points (default: %(default)s)",
    )
    result.add_argument("--output", type=Path, help="write the results as JSON, after each model")
    result.add_argument(
        "--resume", action="store_true", help="keep the results in --output, and measure the remaining models"
    )
    args = parser.parse_args(argv)
    if args.resume and args.output is None:
        parser.error("--resume needs --output with the earlier results")
    check_int8(parser, args)
    args.backend = args.backend or "torch"
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.utils.files import check_writable_by_main, locked_by_main
    from res2net_zoo.utils.processes import start_processes

    accelerator = start_processes(args.threads, autocast_precision(args))
    check_writable_by_main(args.output, accelerator)
    with locked_by_main(args.output, accelerator):
        return validate(args, accelerator)


def validate(args: argparse.Namespace, accelerator: "Accelerator") -> int:
    """Measure the models; return the exit code."""
    from accelerate.utils import broadcast_object_list

    from res2net_zoo import catalog
    from res2net_zoo.cli.results import ResultsFile
    from res2net_zoo.utils.console import lost_connection
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import all_or_none, wait_for_all

    def read_old() -> list[dict]:
        wanted = args.resume and accelerator.is_main_process and args.output.exists()
        return read_results(args.output) if wanted else []

    (results,) = broadcast_object_list([all_or_none(read_old)])
    source = open_data(args, accelerator)
    exit_code = 0
    rows = []  # the results of this run's models, in their order
    file = ResultsFile(args.output if accelerator.is_main_process else None)
    for name in list(catalog.load().checkpoints) if args.model == ["all"] else args.model:
        run = {
            "model": name,
            "data": args.data,
            "split": source.split,
            "precision": INT8 if args.mixed_precision == INT8 else accelerator.mixed_precision,
            "options": {key: getattr(args, key) for key in OPTIONS},
        }
        old = next((result for result in results if run.items() <= result.items()), None)
        try:
            result = run | measure(name, source, args, accelerator, old)
        except Exception as error:
            if (len(args.model) == 1 and args.model != ["all"]) or lost_connection(error):
                raise
            exit_code = max(exit_code, report_failure(name, error, accelerator))
            continue
        results = [other for other in results if other is not old] + [result]
        rows.append(result)
        file.write(results)

    if accelerator.is_main_process and rows:
        print_table(rows)
    wait_for_all()  # if a process exits with 1, the launcher ends the others
    accelerator.end_training()
    file.check("in the table above")
    if args.check and (unpublished := [result["model"] for result in rows if result["passed"] is None]):
        raise InputError(nothing_published(", ".join(unpublished)))
    if any((args.check and not result["passed"]) or result["skipped"] for result in rows):
        exit_code = max(exit_code, 1)
    return exit_code


def open_data(args: argparse.Namespace, accelerator: "Accelerator") -> "Source":
    """Open the images, and warn about skipped files."""
    from res2net_zoo.data.sources import open_source
    from res2net_zoo.utils.console import warn
    from res2net_zoo.utils.processes import check_same, main_first

    source = main_first(
        accelerator,
        lambda: open_source(
            args.data,
            args.split,
            streaming=args.streaming,
            label_column=args.label_column,
            labelled=args.benchmark != "imagenet-real",
        ),
    )
    check_same({"the number of images": source.num_rows}, "give all machines the same data", "data")
    if source.skipped:
        warn(f"skipped in {args.data}: {source.skipped}")
    return source


def report_failure(name: str, error: Exception, accelerator: "Accelerator") -> int:
    """Report why one of several models could not be measured; return the exit code."""
    from res2net_zoo.utils.console import report
    from res2net_zoo.utils.errors import InputError

    if accelerator.is_main_process:
        report(f"{name}: {str(error) or type(error).__name__}")
    return 2 if isinstance(error, InputError) else 1


def nothing_published(names: str) -> str:
    return (
        f"--check found no published accuracy of {names} on this data; if the data is an ImageNet benchmark, "
        "name it with --benchmark"
    )


def measure(
    name: str, source: "Source", args: argparse.Namespace, accelerator: "Accelerator", old: dict | None = None
) -> dict:
    """Measure one model; return its object in results.json.

    An earlier result is kept if weights, preprocessing and data are unchanged; the published accuracy is updated.
    """
    import torch
    from accelerate.utils import broadcast_object_list

    from res2net_zoo.data.labels import match_classes
    from res2net_zoo.inference.forward import create_forward
    from res2net_zoo.utils.console import warn
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import all_or_none, workers_of
    from res2net_zoo.weights.pretrained import create_model
    from res2net_zoo.weights.published import find_published, published_accuracies

    model = all_or_none(lambda: create_model(name).to(accelerator.device))
    model = model.to(memory_format=torch.channels_last)  # 1.4 times the images per second on a CPU
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    if not num_classes:
        raise InputError(f"{name} has no classifier to validate")
    label_names: Any = model.pretrained_cfg.get("label_names")  # type: ignore[operator, union-attr]
    benchmark = benchmark_of(source, source.num_rows, num_classes, args.benchmark)
    classes = match_classes(source.class_names, num_classes, label_names, benchmark)
    if classes.warning:
        warn(f"{name}: {classes.warning}")
    accuracies = published_accuracies(name)
    # The size of a stream is known only after it was read.
    if not accuracies or source.num_rows is not None or num_classes != 1000 or args.benchmark is not None:
        check_published(name, accuracies, benchmark, source, args)
    images = calibration_of(model, source, args, accelerator) if args.mixed_precision == INT8 else None
    # File times may differ between machines.
    (identity,) = broadcast_object_list([identity_of(model, source) | calibration_sha256(images)])
    if old is not None:
        changed = [key.replace("_sha256", "") for key, value in identity.items() if old.get(key) != value]
        if not changed:
            accelerator.print(f"{name} is already done")
            return old | compared(old, find_published(accuracies, old["benchmark"], source), args.tolerance)
        accelerator.print(f"{name} is measured again, because of changed or missing records: {', '.join(changed)}")
    forward = create_forward(model.eval(), args.backend, accelerator, args.batch_size, images)
    how: dict[str, Any] = dict(model=model, source=source, classes=classes, accelerator=accelerator)
    how |= dict(batch_size=args.batch_size, workers=workers_of(args.workers, accelerator.device), forward=forward.call)
    counts = count(name, how, args.skip_corrupt)
    benchmark = benchmark or benchmark_of(source, counts.num_rows, num_classes, args.benchmark)
    result = result_of(counts, benchmark, args, accelerator) | identity
    result |= {"backend": forward.backend, "calibration_images": forward.calibration_images}
    if args.profile:
        result |= profile(how, counts.num_rows / counts.seconds)
    return compared(result, find_published(accuracies, benchmark, source), args.tolerance)


def calibration_of(
    model: Any, source: "Source", args: argparse.Namespace, accelerator: "Accelerator"
) -> "torch.Tensor":
    """Return the calibration images, by default of the data's training split.

    Raises:
        InputError: They are missing, and the data is streamed, or lacks a training split that is not measured.
    """
    from res2net_zoo.data.sources import splits_of
    from res2net_zoo.inference.calibration import calibration_images
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import main_first

    def load() -> "torch.Tensor":
        if args.calibrate is None:
            if args.streaming:
                raise InputError(f"{source.name} is a stream; name the images that calibrate int8", "calibrate")
            if "train" not in splits_of(args.data) or source.split.startswith("train"):
                what = "has no training split besides the measured images; name the images that calibrate int8"
                raise InputError(f"{source.name} {what}", "calibrate")
        return calibration_images(model, args.calibrate or args.data)

    return main_first(accelerator, load)


def calibration_sha256(images: "torch.Tensor | None") -> dict[str, str | None]:
    """Return a hash of the calibration images; None without."""
    digest = None if images is None else hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return {"calibration_sha256": digest}


def benchmark_of(source: "Source", num_rows: int | None, num_classes: int, wanted: str | None) -> str | None:
    """Return which ImageNet benchmark the data is; None for other data or models of other classes."""
    from res2net_zoo.data.labels import recognize

    if wanted is not None or num_classes != 1000:
        return wanted
    return recognize(source.name, source.split, source.class_names, num_rows)


def check_published(
    name: str,
    accuracies: "Sequence[Accuracy]",
    benchmark: str | None,
    source: "Source",
    args: argparse.Namespace,
) -> None:
    """Raise an error if --check has nothing to compare; warn if the model was trained on the data."""
    from res2net_zoo.utils.console import warn
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.weights.published import find_published, trained_on

    hint = trained_on(accuracies, source)
    if args.check and find_published(accuracies, benchmark, source) is None:
        raise InputError(nothing_published(name) + (f"; {hint}" if hint else ""), *["split"] * bool(hint))
    if hint:
        warn(f"{name}: {hint}", "split")


def identity_of(model: Any, source: "Source") -> dict:
    """Return what a result depends on: hashes of weights, data and label names, and the preprocessing."""
    from res2net_zoo.data.identity import source_sha256
    from res2net_zoo.weights.fingerprint import model_identity

    return model_identity(model) | {"data_sha256": source_sha256(source)}


def count(name: str, how: dict[str, Any], skip_corrupt: bool) -> "Counts":
    """Count correct predictions, and warn about images that cannot be decoded.

    Args:
        name: The model.
        how: Further arguments of `evaluate`.
        skip_corrupt: Whether to skip images that cannot be decoded.
    """
    from res2net_zoo.evaluation import evaluate
    from res2net_zoo.utils.console import warn

    counts = evaluate(**how, skip_corrupt=skip_corrupt, desc=as_in_clone(name))
    if counts.corrupt:
        warn(f"{len(counts.corrupt)} corrupt images skipped: {'; '.join(counts.corrupt)}")
    return counts


def profile(how: dict[str, Any], whole: float) -> dict[str, float | int]:
    """Measure and print the throughput of data loading and of the model; return fields of results.json.

    Args:
        how: Further arguments of `measure_throughput`.
        whole: Images per second of the evaluation.
    """
    from res2net_zoo.evaluation import measure_throughput
    from res2net_zoo.utils.console import warn
    from res2net_zoo.utils.errors import InputError

    try:
        found = measure_throughput(**how, whole=whole)
    except InputError as error:  # the accuracy is known already
        warn(error)
        return {}
    how["accelerator"].print(found)
    return {
        "loader_images_per_second": round(found.loader, 1),
        "model_images_per_second": round(found.model, 1),
        "workers": found.workers,
    }


def result_of(counts: "Counts", benchmark: str | None, args: argparse.Namespace, accelerator: "Accelerator") -> dict:
    """Return the measured values as an object of results.json, without the published ones."""
    return {
        "benchmark": benchmark,
        "samples": counts.samples,
        "correct1": counts.top1,
        "correct5": counts.top5,
        "top1": counts.percent(counts.top1),
        "top5": counts.percent(counts.top5),
        **figures(None),
        "skipped": len(counts.corrupt),
        "images_per_second": round(counts.num_rows / counts.seconds, 1),
        "num_processes": accelerator.num_processes,
        "batch_size": args.batch_size,
        "device": accelerator.device.type,
    }


def compared(result: dict, published: "Accuracy | None", tolerance: float) -> dict:
    """Return a result with the published accuracy, and whether it is reached."""
    from res2net_zoo.weights.published import agrees

    passed = agrees(result["top1"], result["top5"], published, tolerance)
    return result | figures(published) | {"passed": passed}


def figures(published: "Accuracy | None") -> dict:
    """Return the published accuracy as fields of results.json."""
    return {f"published_{key}": getattr(published, key, None) for key in ("top1", "top5", "source")}


def read_results(path: Path) -> list[dict]:
    """Read the results of an earlier run.

    Raises:
        InputError: The file contains something else.
    """
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import read_json

    results = read_json(path)
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise InputError(f"{path} was not written by this program: it is not a list of objects; name another --output")
    for number, result in enumerate(results, 1):
        for key, fits in RESULT.items():
            if key not in result or not fits(result[key]):
                what = "is missing" if key not in result else f"cannot be {str(result[key])[:40]!r}"
                raise InputError(
                    f"{path} was not written by this program: {key} of result {number} {what}; name another --output"
                )
        result["options"].setdefault("backend", "torch")  # older versions have no other backend
        result["options"].setdefault("calibrate", None)
        result.setdefault("backend", "torch")
    return results


def _text(value: object) -> bool:
    return isinstance(value, str)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _number_or_none(value: object) -> bool:
    return value is None or _number(value)


# Required fields of an earlier result.
RESULT: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("model", "data", "split", "precision"), _text),
    "options": lambda value: isinstance(value, dict),
    "benchmark": lambda value: value is None or _text(value),
    **dict.fromkeys(("samples", "skipped", "images_per_second", "top1", "top5"), _number),
    **dict.fromkeys(("published_top1", "published_top5"), _number_or_none),
}


def print_table(results: list[dict]) -> None:
    """Print the results as a table."""
    from res2net_zoo.utils.markdown import markdown_table

    header = (
        "model",
        "data",
        "split",
        "images",
        "top-1",
        "published",
        "top-5",
        "published",
        "backend",
        "images/s",
        "check",
    )
    print(markdown_table(header, [table_row(result) for result in results]))
    sys.stdout.flush()


def table_row(result: dict) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return [
        as_in_clone(result["model"]),
        result["benchmark"] or as_in_clone(result["data"]),
        result["split"],
        str(result["samples"]),
        percent(result["top1"]),
        percent(result["published_top1"]),
        percent(result["top5"]),
        percent(result["published_top5"]),
        f"{result['backend']}, {PRECISION_NAMES[result['precision']]}",
        str(result["images_per_second"]),
        {None: "nothing published", True: "passed", False: "FAILED"}[result["passed"]],
    ]
