r"""Predict the classes of images, and optionally save their embeddings.

Usage: res2net-zoo predict IMAGE ... [--model NAME] [--format table|jsonl|csv] [--output FILE]

Folders are searched recursively. The result does not depend on the number of processes. Without --model, the shipped
model recognizes digits. Bytes of a path that are not UTF-8 are written as \udcXX, as in Python's `os.fsdecode`.

Examples:
  res2net-zoo predict holiday.jpg --model res2net101d
  res2net-zoo predict photos/ 'scans/*.png' --model res2net101d --format csv --output classes.csv
  res2net-zoo predict photos/ --model res2net101d --embeddings embeddings.parquet

Exit codes: 0 done; 1 --skip-corrupt skipped images; 2 bad input.
"""

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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
    import torch
    from accelerate import Accelerator

MANY = 256  # images for which a faster backend saves more time than its choice takes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help=IMAGES)
    add("--model", default=shipped_model(), help=MODEL)
    add("--topk", type=within(int, 1), default=5, help="classes to print for each image (default: %(default)s)")
    add("--format", choices=("table", "jsonl", "csv"), default="table", help="output format (default: %(default)s)")
    add("--output", type=Path, help="write the result to FILE (default: the standard output)")
    add("--embeddings", type=Path, help="write path and embedding (pooled features) to a Parquet file")
    add_batch_size(add, 32)
    add_machine(add, int8=True)
    add_backend(add, None, f"auto for int8, and on a CPU for {MANY} images or more without --embeddings, else torch")
    add_calibrate(add, "the shipped digits for the shipped model")
    add("--skip-corrupt", action="store_true", help=SKIP_CORRUPT)
    args = parser.parse_args(argv)
    if args.output and args.embeddings and args.output.resolve() == args.embeddings.resolve():
        parser.error(f"--output and --embeddings are both {args.output}; name two files")
    if args.embeddings and args.backend not in (None, "torch"):
        parser.error(f"--embeddings needs plain PyTorch; remove --backend {args.backend}")
    if args.embeddings and args.mixed_precision == INT8:
        parser.error("--embeddings needs plain PyTorch; remove --precision int8")
    check_int8(parser, args)
    check_calibrate(parser, args, shipped_data() if args.model == shipped_model() else None)
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    import torch
    from accelerate.utils import gather_object

    from res2net_zoo.data.images import find_images
    from res2net_zoo.data.labels import class_names
    from res2net_zoo.utils.console import progress_bar, warn
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_writable_by_main
    from res2net_zoo.utils.processes import all_or_none, check_same, start_processes, wait_for_all
    from res2net_zoo.weights.pretrained import create_model

    accelerator = start_processes(args.threads, autocast_precision(args))
    paths = all_or_none(lambda: find_images(args.images))
    check_same({"the number of images": len(paths)}, "give all machines the same images", "images")
    for path in (args.output, args.embeddings):
        check_writable_by_main(path, accelerator)
    model: Any = all_or_none(lambda: create_model(args.model)).eval()
    if not model.num_classes:
        raise InputError(f"{args.model} has no classifier to predict with")
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    names = class_names(model)
    answer = create_answer(model, len(paths), args, accelerator)

    skipped = 0
    steps = range(-(-len(paths) // (args.batch_size * accelerator.num_processes)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(output_errors())
        write = stack.enter_context(writer(args, names)) if accelerator.is_main_process else None
        batches = predict(model, answer, paths, args, accelerator)
        for _ in progress_bar(accelerator, steps, desc="predict", unit="batch"):
            # In the last batch, some processes may have no image.
            share = all_or_none(lambda: next(batches, []))
            # Each process has every world-th image of a batch, so sorting restores the order.
            results: list[tuple[int, Result]] = sorted(gather_object(share), key=lambda pair: pair[0])
            for _, (path, corrupt, scores, classes, embedding) in results:
                if corrupt is not None:
                    skipped += 1
                    if accelerator.is_main_process:
                        warn(f"{path} is skipped: {corrupt}")
                elif write is not None:
                    write(path, scores, classes, embedding)
        if skipped == len(paths):
            raise InputError(f"none of the {skipped} images can be decoded")
    wait_for_all()  # if a process exits with 1, the launcher ends the others
    accelerator.end_training()
    return 1 if skipped else 0


# Path; error, if skipped; scores and classes of the top predictions, best first; embedding.
Result = tuple[str, str | None, list[float], list[int], "torch.Tensor | None"]


# Maps images (N, C, H, W) to logits (N, classes), and to embeddings if they are wanted.
Answer = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor | None"]]


def create_answer(model: Any, num_images: int, args: argparse.Namespace, accelerator: "Accelerator") -> Answer:
    """Return the forward pass, by the fastest backend in int8 or if there are many images."""
    from res2net_zoo.inference.forward import create_forward
    from res2net_zoo.utils.processes import main_first

    if not args.embeddings:
        images = None
        if args.mixed_precision == INT8:
            from res2net_zoo.inference.calibration import calibration_images  # imports datasets

            images = main_first(accelerator, lambda: calibration_images(model, args.calibrate))
        fast = accelerator.device.type == "cpu" and num_images >= MANY
        backend = args.backend or ("auto" if fast else "torch")
        forward = create_forward(model, backend, accelerator, min(args.batch_size, num_images), images).call
        return lambda images: (forward(images), None)

    def with_embeddings(images: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        with accelerator.autocast():
            features = model.forward_features(images)
            return model.forward_head(features), model.forward_head(features, pre_logits=True)

    return with_embeddings


def predict(
    model: Any,
    answer: "Answer",
    paths: list[str],
    args: argparse.Namespace,
    accelerator: "Accelerator",
) -> Iterator[list[tuple[int, Result]]]:
    """Yield the results of this process batch by batch, each with the index of its image.

    Raises:
        InputError: An image cannot be decoded, and --skip-corrupt is not set.
    """
    import torch
    from torch.utils.data import DataLoader

    from res2net_zoo.data.images import MapSamples, Sample
    from res2net_zoo.data.preprocessing import evaluation_samples
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import default_workers

    samples = evaluation_samples(model)
    indices = range(accelerator.process_index, len(paths), accelerator.num_processes)
    rows: Any = [{"image": {"bytes": None, "path": path}} for path in paths]
    workers = default_workers(accelerator.device) if args.workers is None else args.workers
    if len(indices) <= args.batch_size:  # one batch: a worker would have nothing to do while the model runs
        workers = 0
    loader: DataLoader = DataLoader(
        MapSamples(rows, samples, indices),
        batch_size=args.batch_size,
        num_workers=workers,
        collate_fn=list,
    )
    places = iter(indices)
    batch: list[Sample]
    for batch in loader:
        good = [sample for sample in batch if sample.image is not None]
        answers: Iterator[tuple[list[float], list[int], torch.Tensor | None]] = iter(())
        if good:
            images = torch.stack([sample.image for sample in good if sample.image is not None])
            images = images.to(accelerator.device).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                logits, embeddings = answer(images)
            best = logits.float().softmax(dim=1).topk(min(args.topk, logits.shape[1]), dim=1)
            if not best.values.isfinite().all():
                raise InputError("the model's output is not finite; try another --precision")
            pooled = [None] * len(good) if embeddings is None else list(embeddings.float().cpu().flatten(1))
            answers = iter(list(zip(best.values.tolist(), best.indices.tolist(), pooled, strict=True)))
        results: list[tuple[int, Result]] = []
        for sample in batch:
            place = next(places)
            if sample.image is None and not args.skip_corrupt:
                raise InputError(
                    f"{paths[place]} is corrupt ({sample.corrupt or sample.fatal}); use --skip-corrupt to skip it"
                )
            if sample.image is None:
                results.append((place, (paths[place], sample.corrupt or sample.fatal, [], [], None)))
            else:
                results.append((place, (paths[place], None, *next(answers))))
        yield results


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Raise InputError if the result cannot be written, for example because the disk is full."""
    from res2net_zoo.utils.errors import InputError

    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"cannot write the result: {error.strerror or error}") from error


@contextlib.contextmanager
def writer(args: argparse.Namespace, names: list[str]) -> Iterator[Callable[..., None]]:
    """Yield a function that writes the result of one image; the files appear when all are written."""
    from res2net_zoo.utils.console import printable

    with contextlib.ExitStack() as stack:
        out: IO[str] = stack.enter_context(whole_file(args.output)) if args.output else sys.stdout
        embed = stack.enter_context(parquet(args.embeddings)) if args.embeddings else None
        rows: list[tuple[str, ...]] = []
        table = csv.writer(out) if args.format == "csv" else None
        shown = printable if out.isatty() else str  # a terminal would interpret control characters in names
        if table:
            table.writerow(("path", "rank", "class", "name", "score"))

        def write(path: str, scores: list[float], classes: list[int], embedding: Any) -> None:
            if embed:
                embed(path, embedding)
            if args.format == "jsonl":
                answers = [
                    {"class": index, "name": names[index], "score": round(score, 6)}
                    for score, index in zip(scores, classes, strict=True)
                ]
                line = json.dumps({"path": path, "predictions": answers}, ensure_ascii=False)
                print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line), file=out, flush=True)
            elif table:
                for rank, (score, index) in enumerate(zip(scores, classes, strict=True), 1):
                    table.writerow((shown(path), rank, index, shown(names[index]), f"{score:.6f}"))
            else:
                classified = [f"{names[i]} {100 * score:.1f}" for score, i in zip(scores, classes, strict=True)]
                rows.append((path, *classified))

        yield write
        if args.format == "table" and rows:
            from res2net_zoo.utils.markdown import markdown_table

            header = ("image", *(f"{rank}. (percent)" for rank in range(1, len(rows[0]))))
            print(markdown_table(header, rows), file=out)
        out.flush()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that replaces `path` atomically at the end."""
    from res2net_zoo.utils.files import temporary_file

    # Bytes of a name that are not UTF-8 are written as \udcXX, as in JSON.
    with (
        temporary_file(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


@contextlib.contextmanager
def parquet(path: Path) -> Iterator[Callable[[str, Any], None]]:
    """Yield a function that appends an embedding to a Parquet file, which is written in groups of rows."""
    import numpy as np
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    from res2net_zoo.utils.files import temporary_file

    group: list[tuple[str, Any]] = []
    file: ParquetWriter | None = None

    with temporary_file(path) as temporary:

        def flush() -> None:
            nonlocal file
            if not group:
                return
            width = len(group[0][1])
            schema = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
            file = file or ParquetWriter(temporary, schema)
            values = pa.array(np.concatenate([embedding.numpy() for _, embedding in group]))
            paths = [path.encode("utf-8", "backslashreplace").decode() for path, _ in group]
            columns = [pa.array(paths), pa.FixedSizeListArray.from_arrays(values, width)]
            file.write_table(pa.Table.from_arrays(columns, schema=schema))
            group.clear()

        def add(path: str, embedding: Any) -> None:
            group.append((path, embedding))
            if len(group) == 1024:
                flush()

        yield add
        flush()
        if file:
            file.close()
