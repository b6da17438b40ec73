r"""Predict the classes of images, and optionally save their embeddings.

Usage: res2net-zoo predict IMAGE ... | --data SRC [--model NAME] [--output FILE | DIR]

Folders are searched recursively. The result does not depend on the number of processes. Without --model, the shipped
model recognizes digits. Bytes of a path that are not UTF-8 are written as \udcXX, as in Python's `os.fsdecode`.

For many images the output is a folder of Parquet files: with --format parquet, or without --format if --output is a
folder or ends in /, or with --data if it lacks a suffix. Each file is written atomically, and --resume writes the
missing ones.

SRC is a Hub dataset id, a folder, or local Parquet, Arrow or WebDataset files.

Examples:
  res2net-zoo predict holiday.jpg --model res2net101d
  res2net-zoo predict photos/ 'scans/*.png' --model res2net101d --format csv --output classes.csv
  res2net-zoo predict photos/ --model res2net101d --embeddings embeddings.parquet
  res2net-zoo predict --data ORG/NAME --split train --streaming --model res2net101d --output predictions/ --resume

Exit codes: 0 done; 1 --skip-corrupt skipped images; 2 bad input.
"""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import (
    IMAGES,
    INT8,
    MODEL,
    SKIP_CORRUPT,
    add_backend,
    add_batch_size,
    add_calibrate,
    add_machine,
    autocast_precision,
    check_calibrate,
    check_int8,
)
from res2net_zoo.cli.shipped import shipped_data, shipped_model
from res2net_zoo.utils.command_line import within

if TYPE_CHECKING:
    from accelerate import Accelerator

    from res2net_zoo.inference.prediction import Answer, Images, Numbered, Prediction

MANY = 256  # images for which a faster backend saves more time than its choice takes
PARQUET = "parquet"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help=IMAGES)
    add("--data", metavar="SRC", help="images of a dataset, instead of files; labels are copied, but not needed")
    add("--split", help="split of --data (default: validation, else test, else the only one)")
    add("--streaming", action="store_true", help="stream --data without caching it")
    add("--model", default=shipped_model(), help=MODEL)
    add("--topk", type=within(int, 1), default=5, help="classes to print for each image (default: %(default)s)")
    about = "output format; parquet is a folder (default: table, or parquet if --output is a folder)"
    add("--format", choices=("table", "jsonl", "csv", PARQUET), help=about)
    add("--output", metavar="FILE", help="write the result to a file or folder (default: the standard output)")
    about = "write path and embedding (pooled features) to a Parquet file; for a folder without FILE, as a column"
    add("--embeddings", nargs="?", const=True, metavar="FILE", help=about)
    about = "images for each file of the folder (default: 1000, or as in the run that --resume continues)"
    add("--shard-size", type=within(int, 1), help=about)
    add("--resume", action="store_true", help="continue the folder --output with the files that are missing")
    add_batch_size(add, 32)
    add_machine(add, int8=True)
    add_backend(add, None, f"auto for int8, and on a CPU for {MANY} images or more without --embeddings, else torch")
    add_calibrate(add, "the shipped digits for the shipped model")
    add("--skip-corrupt", action="store_true", help=SKIP_CORRUPT)
    args = parser.parse_args(argv)
    check_images(parser, args)
    check_output(parser, args)
    if args.embeddings and args.backend not in (None, "torch"):
        parser.error(f"--embeddings needs plain PyTorch; remove --backend {args.backend}")
    if args.embeddings and args.mixed_precision == INT8:
        parser.error("--embeddings needs plain PyTorch; remove --precision int8")
    check_int8(parser, args)
    check_calibrate(parser, args, shipped_data() if args.model == shipped_model() else None)
    return args


def check_images(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check that the images are either files or a dataset."""
    if not args.images and args.data is None:
        parser.error("IMAGE or --data is required")
    if args.images and args.data is not None:
        parser.error(f"images are given as files ({args.images[0]}) and as --data; choose one")
    if args.data is None and (args.split or args.streaming):
        parser.error(f"{'--split' if args.split else '--streaming'} needs --data")


def check_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Decide whether the output is a folder, and check its options."""
    if "" in (args.output, args.embeddings):
        parser.error(f"{'--output' if args.output == '' else '--embeddings'} is empty; name a file")
    if (
        args.output
        and isinstance(args.embeddings, str)
        and Path(args.output).resolve() == Path(args.embeddings).resolve()
    ):
        parser.error(f"--output and --embeddings are both {args.output}; name two files")
    if args.format is None:
        args.format = PARQUET if args.output and is_folder(args) else "table"
    args.output = Path(args.output) if args.output else None
    if args.format == PARQUET:
        if args.output is None:
            parser.error("--format parquet needs --output DIR")
        if args.streaming and args.output.resolve().is_relative_to(Path(args.data).expanduser().resolve()):
            parser.error(f"--output {args.output} is in the folder --data, which would change it; name another folder")
        if isinstance(args.embeddings, str):
            what = f"in a folder, embeddings are a column; write --embeddings without {args.embeddings}"
            parser.error(f"{what}, after the images or before another option")
        return
    if args.resume or args.shard_size:
        parser.error(f"{'--resume' if args.resume else '--shard-size'} needs a folder, such as --output predictions/")
    if args.embeddings is True:
        parser.error("--embeddings needs a FILE")
    args.embeddings = Path(args.embeddings) if args.embeddings else None


def is_folder(args: argparse.Namespace) -> bool:
    """Return whether the output is an existing folder, or a new one by its name and the other options."""
    if os.path.exists(args.output):
        return os.path.isdir(args.output)
    many = args.data is not None or args.resume or args.shard_size is not None
    return args.output.endswith(os.sep) or (many and not Path(args.output).suffix)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.utils.files import locked_by_main
    from res2net_zoo.utils.processes import start_processes, wait_for_all

    accelerator = start_processes(args.threads, autocast_precision(args))
    images = open_images(args, accelerator)
    if args.format == PARQUET:
        with locked_by_main(args.output, accelerator):
            skipped = predict_to_folder(images, args, accelerator)
    else:
        skipped = predict_to_file(images, args, accelerator)
    wait_for_all()  # if a process exits with 1, the launcher ends the others
    accelerator.end_training()
    return 1 if skipped else 0


def open_images(args: argparse.Namespace, accelerator: "Accelerator") -> "Images":
    """Find the images; warn about skipped files."""
    from res2net_zoo.data.images import find_images
    from res2net_zoo.inference.prediction import images_of_files, images_of_source
    from res2net_zoo.utils.console import warn
    from res2net_zoo.utils.processes import all_or_none, check_same, main_first

    if args.data is None:
        paths = all_or_none(lambda: find_images(args.images))
        check_same({"the number of images": len(paths)}, "give all machines the same images", "images")
        return images_of_files(paths)
    from res2net_zoo.data.sources import open_source  # imports `datasets`, which takes half a second

    source = main_first(
        accelerator, lambda: open_source(args.data, args.split, streaming=args.streaming, labelled=False)
    )
    if source.skipped:
        warn(f"skipped in {args.data}: {source.skipped}")
    args.split = source.split
    return images_of_source(source)


def load_model(args: argparse.Namespace, accelerator: "Accelerator") -> Any:
    """Load the model on this process's device, in evaluation mode."""
    import torch

    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import all_or_none
    from res2net_zoo.weights.pretrained import create_model

    model: Any = all_or_none(lambda: create_model(args.model)).eval()
    if not model.num_classes:
        raise InputError(f"{args.model} has no classifier to predict with")
    return model.to(accelerator.device, memory_format=torch.channels_last)


def load_calibration(model: Any, args: argparse.Namespace, accelerator: "Accelerator") -> Any:
    """Return the images that calibrate int8; None for other precisions."""
    if args.mixed_precision != INT8:
        return None
    from res2net_zoo.inference.calibration import calibration_images  # imports `datasets`
    from res2net_zoo.utils.processes import main_first

    return main_first(accelerator, lambda: calibration_images(model, args.calibrate))


def prepare_answer(
    model: Any,
    images: "Images",
    args: argparse.Namespace,
    accelerator: "Accelerator",
    calibration: Any,
    backend: str | None = None,
) -> "tuple[Answer, str]":
    """Return the forward pass and its backend: `backend`, or without one the fastest in int8 or for many images."""
    from res2net_zoo.inference.prediction import create_answer

    number = MANY if images.number is None else images.number
    fast = args.mixed_precision == INT8 or (accelerator.device.type == "cpu" and number >= MANY)
    size = max(1, min(args.batch_size, number))
    backend = backend or ("auto" if fast else "torch")
    return create_answer(model, bool(args.embeddings), backend, accelerator, size, calibration)


def predict(
    model: Any,
    answer: "Answer",
    images: "Images",
    batches: "Iterable[list[Numbered]]",
    args: argparse.Namespace,
    accelerator: "Accelerator",
) -> "Iterator[list[Prediction]]":
    """Yield the predictions of this process."""
    from res2net_zoo.inference.prediction import predict_batches
    from res2net_zoo.utils.processes import workers_of

    workers = workers_of(args.workers, accelerator.device)
    if images.number is not None and images.number <= args.batch_size * accelerator.num_processes:
        workers = 0  # one batch: a worker would have nothing to do while the model runs
    options: Any = dict(topk=args.topk, workers=workers, skip_corrupt=args.skip_corrupt)
    return predict_batches(model, answer, images, batches, accelerator, **options)


def predict_to_file(images: "Images", args: argparse.Namespace, accelerator: "Accelerator") -> int:
    """Write the predictions to a file or the standard output; return the number of skipped images."""
    from res2net_zoo.data.labels import class_names
    from res2net_zoo.inference.prediction import batches_in_turns, gathered
    from res2net_zoo.inference.prediction_files import output_errors, prediction_writer
    from res2net_zoo.utils.console import progress_bar, warn
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_writable_by_main

    for path in (args.output, args.embeddings):
        check_writable_by_main(path, accelerator)
    model = load_model(args, accelerator)
    calibration = load_calibration(model, args, accelerator)
    answer, _ = prepare_answer(model, images, args, accelerator, calibration, args.backend)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = batches_in_turns(images, args.batch_size, rank, world)
    predictions = gathered(predict(model, answer, images, batches, args, accelerator))
    writer = prediction_writer(args.output, args.embeddings, args.format, class_names(model), images)
    skipped = written = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(output_errors())
        write = stack.enter_context(writer) if accelerator.is_main_process else None
        progress = stack.enter_context(progress_bar(accelerator, total=images.number, desc="predict", unit="image"))
        for prediction in predictions:
            progress.update()
            if prediction.corrupt is not None:
                skipped += 1
                warn(f"{images.place(prediction.index, prediction.path)} is skipped: {prediction.corrupt}")
                continue
            written += 1
            if write is not None:
                write(prediction)
        if not written:
            raise InputError(f"none of the {skipped} images can be decoded" if skipped else "the data have no images")
    return skipped


def predict_to_folder(images: "Images", args: argparse.Namespace, accelerator: "Accelerator") -> int:
    """Write the predictions to a folder of Parquet files; return the number of skipped images."""
    from res2net_zoo.data.labels import class_names
    from res2net_zoo.inference.prediction import batches_of_shards
    from res2net_zoo.inference.prediction_folder import SHARD_SIZE, PredictionFolder
    from res2net_zoo.utils.console import progress_bar
    from res2net_zoo.utils.files import check_can_make
    from res2net_zoo.utils.processes import all_or_none

    all_or_none(lambda: check_can_make(args.output))
    folder = PredictionFolder(args.output, accelerator)
    recorded = folder.open(args.resume)
    model = load_model(args, accelerator)
    calibration = load_calibration(model, args, accelerator)
    # All shards are of one backend, because the last digits of scores depend on it.
    earlier = recorded or {}
    backend = earlier.get("backend", args.backend) if args.backend in (None, "auto") else args.backend
    answer, backend = prepare_answer(model, images, args, accelerator, calibration, backend)
    size = args.shard_size or earlier.get("shard_size", SHARD_SIZE)
    folder.find(settings_of(model, images, calibration, backend, size, args, accelerator), recorded)
    if not folder.was_complete:
        rank, world = accelerator.process_index, accelerator.num_processes
        found = frozenset(folder.shards)  # a copy, because the folder adds those that it writes
        batches = batches_of_shards(images, args.batch_size, size, found, rank, world)
        predictions = predict(model, answer, images, batches, args, accelerator)
        done = sum(shard.images for shard in folder.shards.values())
        with progress_bar(accelerator, total=images.number, initial=done, desc="predict", unit="image") as progress:
            folder.write(predictions, class_names(model), images, progress)
    accelerator.print(folder)
    return sum(shard.skipped for shard in folder.shards.values())


def settings_of(
    model: Any,
    images: "Images",
    calibration: Any,
    backend: str,
    shard_size: int,
    args: argparse.Namespace,
    accelerator: "Accelerator",
) -> dict[str, Any]:
    """Return what the predictions depend on, the same in all processes."""
    from accelerate.utils import broadcast_object_list

    from res2net_zoo.inference.forward import PRECISIONS
    from res2net_zoo.utils.processes import all_or_none
    from res2net_zoo.weights.fingerprint import model_identity

    def find() -> dict[str, Any]:
        return {
            "model": args.model,
            **model_identity(model),
            "precision": INT8 if args.mixed_precision == INT8 else PRECISIONS[accelerator.mixed_precision],
            "backend": backend,
            "calibration_sha256": None if calibration is None else hashlib.sha256(calibration.numpy()).hexdigest(),
            "data": images.name or None,
            "split": args.split,
            "streaming": args.streaming,
            "data_sha256": data_sha256(images, args),
            "topk": args.topk,
            "embeddings": bool(args.embeddings),
            "shard_size": shard_size,
        }

    # File times may differ between machines.
    (settings,) = broadcast_object_list([all_or_none(lambda: find() if accelerator.is_main_process else {})])
    return settings


def data_sha256(images: "Images", args: argparse.Namespace) -> str | None:
    """Return a hash of the images' names, sizes and times, or of what identifies the data."""
    from res2net_zoo.data.identity import files_sha256, rows_sha256, stream_sha256

    if args.data is None:
        return files_sha256(images.rows.paths)
    return stream_sha256(args.data) if args.streaming else rows_sha256(images.rows)
