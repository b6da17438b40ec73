"""Predictions as a table, JSON lines, CSV, and embeddings in a Parquet file: one file each, written incrementally."""

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from res2net_zoo.inference.prediction import Images, Prediction
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import temporary_file
from res2net_zoo.utils.markdown import markdown_table

ROW_GROUP = 1024  # rows of a Parquet file that are kept in memory

Write = Callable[[Prediction], None]


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Raise InputError if the result cannot be written, for example because the disk is full."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"cannot write the result: {error.strerror or error}") from error


def utf8(path: str) -> str:
    r"""Return a path whose bytes that are not UTF-8 are written as \udcXX."""
    return path.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def prediction_writer(
    output: Path | None, embeddings: Path | None, form: str, names: list[str], images: Images
) -> Iterator[Write]:
    """Yield a function that writes the prediction of one image; the files appear when all are written.

    Args:
        output: The file; None for the standard output.
        embeddings: Parquet file for the embeddings, if they are wanted.
        form: `table`, `jsonl` or `csv`. A table is kept in memory until the end, the others are not.
        names: Name of each class.
        images: The images; those of a dataset are written with their index and label.
    """
    with contextlib.ExitStack() as stack:
        out: IO[str] = stack.enter_context(whole_file(output)) if output else sys.stdout
        embed = stack.enter_context(embedding_writer(embeddings)) if embeddings else None
        with WRITERS[form](out, names, images) as write:

            def write_both(prediction: Prediction) -> None:
                if embed:
                    embed(prediction)
                write(prediction)

            yield write_both
        out.flush()


@contextlib.contextmanager
def table_writer(out: IO[str], names: list[str], images: Images) -> Iterator[Write]:
    """Yield a function that keeps predictions, which are printed as a Markdown table at the end."""
    rows: list[tuple[str, ...]] = []

    def write(prediction: Prediction) -> None:
        answers = zip(prediction.scores, prediction.classes, strict=True)
        image = prediction.path or str(prediction.index)
        rows.append((image, *(f"{names[index]} {100 * score:.1f}" for score, index in answers)))

    yield write
    if rows:
        header = ("image", *(f"{rank}. (percent)" for rank in range(1, len(rows[0]))))
        print(markdown_table(header, rows), file=out)


@contextlib.contextmanager
def jsonl_writer(out: IO[str], names: list[str], images: Images) -> Iterator[Write]:
    """Yield a function that writes a JSON object on a line."""

    def write(prediction: Prediction) -> None:
        answers = [
            {"class": index, "name": names[index], "score": round(score, 6)}
            for score, index in zip(prediction.scores, prediction.classes, strict=True)
        ]
        facts: dict[str, Any] = {"path": prediction.path}
        if images.name:
            facts = {"index": prediction.index, "path": prediction.path}
        if images.labelled:
            facts["label"] = prediction.label
        line = json.dumps(facts | {"predictions": answers}, ensure_ascii=False)
        print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line), file=out, flush=True)

    yield write


@contextlib.contextmanager
def csv_writer(out: IO[str], names: list[str], images: Images) -> Iterator[Write]:
    """Yield a function that writes a line for each of the top classes."""
    table = csv.writer(out)
    shown = printable if out.isatty() else str  # a terminal would interpret control characters in names
    columns = ["index"] * bool(images.name) + ["path"] + ["label"] * images.labelled
    table.writerow((*columns, "rank", "class", "name", "score"))

    def write(prediction: Prediction) -> None:
        path = "" if prediction.path is None else shown(prediction.path)
        facts = {"index": prediction.index, "path": path, "label": prediction.label}
        for rank, (score, index) in enumerate(zip(prediction.scores, prediction.classes, strict=True), 1):
            row = [facts[column] for column in columns]
            table.writerow((*row, rank, index, shown(names[index]), f"{score:.6f}"))

    yield write


WRITERS = {"table": table_writer, "jsonl": jsonl_writer, "csv": csv_writer}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that replaces `path` atomically at the end."""
    # Bytes of a name that are not UTF-8 are written as \udcXX, as in JSON.
    with (
        temporary_file(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


@contextlib.contextmanager
def embedding_writer(path: Path) -> Iterator[Write]:
    """Yield a function that appends an embedding to a Parquet file, which is written in groups of rows."""
    import numpy as np
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    group: list[Prediction] = []
    file: ParquetWriter | None = None

    with temporary_file(path) as temporary:

        def flush() -> None:
            nonlocal file
            if not group:
                return
            embeddings: list[Any] = [prediction.embedding for prediction in group]
            width = len(embeddings[0])
            schema = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
            file = file or ParquetWriter(temporary, schema)
            values = pa.array(np.concatenate([embedding.numpy() for embedding in embeddings]))
            paths = [utf8(prediction.path or str(prediction.index)) for prediction in group]
            columns = [pa.array(paths), pa.FixedSizeListArray.from_arrays(values, width)]
            file.write_table(pa.Table.from_arrays(columns, schema=schema))
            group.clear()

        def add(prediction: Prediction) -> None:
            group.append(prediction)
            if len(group) == ROW_GROUP:
                flush()

        yield add
        flush()
        if file:
            file.close()
