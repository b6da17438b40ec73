"""Predictions as a folder of Parquet shards, each written whole by one process, with a manifest.

Shard K has the images from K * shard_size on, whatever the number of processes and machines, in `part-K.parquet`. Its
metadata contain the run's settings and its place, so that shards of several folders can be put into one, and the
manifest can be made again. `_manifest.json` is complete only when all shards are written.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import Accelerator
from accelerate.utils import gather_object
from pyarrow import parquet
from tqdm import tqdm

from res2net_zoo.evaluation import advance
from res2net_zoo.inference.prediction import Images, Prediction, batched
from res2net_zoo.inference.prediction_files import ROW_GROUP, output_errors, utf8
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import is_temporary, read_json, sha256_of, temporary_file, write_atomically
from res2net_zoo.utils.processes import all_or_none, processes_here

MANIFEST = "_manifest.json"  # readers of folders of Parquet files skip names that begin with _
METADATA = "res2net_zoo"  # key of the settings and the place in a shard's metadata
SHARD_SIZE = 1000
LARGEST_MANIFEST = 2**30  # bytes; a shard takes about 200
WRITING_SHARE = 0.01  # of the time, at most, is spent on writing unfinished manifests


@dataclass(frozen=True)
class Shard:
    """A file of predictions.

    Attributes:
        file: Its name, which has its number.
        first: Index of its first image.
        images: Number of images.
        rows: Number of predictions.
        skipped: Number of images that could not be decoded.
        sha256: Hash of the file.
    """

    file: str
    first: int
    images: int
    rows: int
    skipped: int
    sha256: str

    @property
    def number(self) -> int:
        """Position among the shards."""
        match = re.fullmatch(r"part-(\d{6,})\.parquet", self.file)
        return int(match[1]) if match else -1


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"part-{number:06d}.parquet"


class PredictionFolder:
    """A folder of predictions that is being written.

    All methods must be called in every process.

    Args:
        path: The folder; it may be a different one on each machine.
        accelerator: The processes.

    Attributes:
        settings: What the predictions depend on.
        shards: The finished shards by number, on any machine.
        was_complete: Whether the folder was finished by an earlier run.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self.settings: dict[str, Any] = {}
        self.shards: dict[int, Shard] = {}
        self.was_complete = False
        self._manifest: dict[str, Any] | None = None  # on any machine
        self._written = self._writing_took = 0.0  # when the manifest was written, and the seconds that it took

    def open(self, resume: bool) -> dict[str, Any] | None:
        """Check that the folder is new or may be continued.

        Args:
            resume: Whether to continue the run that began to write it.

        Returns:
            The settings of that run; None for a new folder.

        Raises:
            InputError: The folder has other files, or predictions that must not be continued.
        """

        def read() -> tuple[dict | None, dict | None]:
            if not self.accelerator.is_local_main_process:
                return None, None
            names = sorted(name for name in _names(self.path) if not is_temporary(name))
            known = [name for name in names if name == MANIFEST or _is_shard(name)]
            if names and not known:
                raise InputError(f"{self.path} is a folder with other files; name a new or an empty folder")
            if not resume:
                if any(map(_is_shard, known)):
                    raise InputError(f"{self.path} has predictions; continue them, or name another folder", "resume")
                return None, None  # the run that wrote the manifest failed in its first shard
            if MANIFEST in known:
                manifest = read_manifest(self.path)
                return manifest, manifest["settings"]
            return None, next((found[0] for name in known if (found := _metadata(self.path / name))), None)

        found = gather_object([all_or_none(read)])
        self._manifest = next((manifest for manifest, _ in found if manifest), None)
        return next((settings for _, settings in found if settings), None)

    def find(self, settings: dict[str, Any], recorded: dict[str, Any] | None) -> None:
        """Find the finished shards of an earlier run, and check all of their bytes.

        Args:
            settings: What the predictions of this run depend on.
            recorded: Those of the earlier run, from `open`.

        Raises:
            InputError: They differ.
        """
        self.settings = json.loads(json.dumps(settings))
        all_or_none(lambda: self._check_settings(recorded, str(self.path)))
        listed = [Shard(**entry) for entry in self._manifest["shards"]] if self._manifest else []
        hashes = {shard.file: shard.sha256 for shard in listed}
        world = processes_here()
        names = [name for name in sorted(_names(self.path)) if _is_shard(name)]
        names = names[self.accelerator.local_process_index % world :: world]
        checked = all_or_none(lambda: [self._check_shard(name, hashes.get(name)) for name in names])
        for shard in chain(*gather_object([[shard for shard in checked if shard]])):
            self.shards[shard.number] = shard
        complete = self._manifest is not None and self._manifest["complete"]
        self.was_complete = complete and self.shards.keys() == {shard.number for shard in listed}

    def _check_settings(self, recorded: dict[str, Any] | None, name: str) -> None:
        if recorded is None or recorded == self.settings:
            return
        keys = [key for key in self.settings if recorded.get(key) != self.settings[key]] or ["settings"]
        changes = [
            f"other {key.removesuffix('_sha256')}"
            if key.endswith("sha256")
            else f"{key} was {recorded.get(key)}, is {self.settings.get(key)}"
            for key in keys
        ]
        what = f"{name} was made with other settings ({'; '.join(changes)})"
        raise InputError(f"{what}; run it with the same settings, or name another folder", "output")

    def _check_shard(self, name: str, sha256: str | None) -> Shard | None:
        """Return a shard; None if it is damaged."""
        path = self.path / name
        try:
            found = _metadata(path)
            if found is None:
                raise ValueError("it lacks the settings that it was made with")
            digest = sha256_of(path)
            if digest != sha256:  # not listed yet, or damaged
                if sha256 is not None:
                    raise ValueError("its hash differs from that in the manifest")
                parquet.read_table(path, page_checksum_verification=True)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            _warn(f"{path} is truncated or damaged ({one_line(error, 100)}); its images are predicted again")
            return None
        settings, place = found
        self._check_settings(settings, str(path))
        return Shard(file=name, sha256=digest, **place)

    def __str__(self) -> str:
        """Return a summary of the finished shards."""
        images, skipped = (sum(getattr(shard, key) for shard in self.shards.values()) for key in ("images", "skipped"))
        rest = f", {skipped:,} skipped" if skipped else ""
        return f"{self.path}: {images:,} images in {len(self.shards):,} shards{rest}"

    def write(self, batches: Iterable[list[Prediction]], names: list[str], images: Images, progress: tqdm) -> None:
        """Write the shards of all processes, one of each process at a time, and the manifest.

        Args:
            batches: This process's predictions, from `batches_of_shards`.
            names: Name of each class.
            images: The images.
            progress: Progress bar that counts images.

        Raises:
            InputError: In any process an image is corrupt, or a shard cannot be written; finished shards remain.
        """
        size = self.settings["shard_size"]
        schema = shard_schema(images.labelled, self.settings["embeddings"])
        rest = self._counted(batches, progress)

        @output_errors()
        def write_next() -> Shard | None:
            if time.monotonic() - self._written > self._writing_took / WRITING_SHARE:
                self._write_manifest(complete=False)
            first = next(rest, None)
            if first is None:
                return None
            return self._write_shard(until_full(first, rest, size), first[0].index // size, names, schema)

        @output_errors()
        def finish() -> None:
            self._check_complete(images.number)
            self._write_manifest(complete=True)

        while new := [shard for shard in gather_object([all_or_none(write_next)]) if shard]:
            self.shards |= {shard.number: shard for shard in new}
        all_or_none(finish)

    def _counted(self, batches: Iterable[list[Prediction]], progress: tqdm) -> Iterator[list[Prediction]]:
        for batch in batches:
            advance(progress, len(batch) * self.accelerator.num_processes)
            yield batch

    def _write_shard(
        self, predictions: Iterable[Prediction], number: int, names: list[str], schema: pa.Schema
    ) -> Shard:
        path = self.path / shard_name(number)
        rows = images = 0

        def decoded() -> Iterator[Prediction]:
            nonlocal images
            for prediction in predictions:
                images += 1
                if prediction.corrupt is None:
                    yield prediction
                else:
                    _warn(f"{prediction.path or f'image {prediction.index}'} is skipped: {prediction.corrupt}")

        with temporary_file(path) as temporary:
            with parquet.ParquetWriter(temporary, schema, write_page_checksum=True) as file:
                for group in batched(decoded(), ROW_GROUP):
                    file.write_table(shard_table(group, names, schema))
                    rows += len(group)
                place = {"first": number * self.settings["shard_size"], "images": images, "rows": rows}
                place["skipped"] = images - rows
                file.add_key_value_metadata({METADATA: json.dumps({"settings": self.settings, "place": place})})
            digest = sha256_of(temporary)
        return Shard(file=path.name, sha256=digest, **place)

    def _write_manifest(self, complete: bool) -> None:
        """Write the manifest, the same on each machine."""
        if not self.accelerator.is_local_main_process:
            return
        start = time.monotonic()
        shards = [self.shards[number] for number in sorted(self.shards)]
        manifest = {
            "complete": complete,
            "settings": self.settings,
            **{key: sum(getattr(shard, key) for shard in shards) for key in ("images", "rows", "skipped")},
            "shards": [asdict(shard) for shard in shards],
        }
        write_atomically(self.path / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n"))
        self._written = time.monotonic()
        self._writing_took = self._written - start

    def _check_complete(self, number: int | None) -> None:
        size, images = self.settings["shard_size"], sum(shard.images for shard in self.shards.values())
        numbers = sorted(self.shards)
        full = all(self.shards[shard].images == size for shard in numbers[:-1])
        if numbers != list(range(len(numbers))) or not full or number not in (None, images):
            raise InputError("the data have changed while they were read; remove the folder and start again", "output")
        if not sum(shard.rows for shard in self.shards.values()):
            raise InputError(f"none of the {images} images can be decoded" if images else "the data have no images")


def until_full(first: list[Prediction], rest: Iterator[list[Prediction]], size: int) -> Iterator[Prediction]:
    """Yield the predictions of one shard, without asking for the first batch of the next one.

    Args:
        first: The first batch of the shard.
        rest: The following batches.
        size: Images per shard.
    """
    for batch in chain([first], rest):
        yield from batch
        if (batch[-1].index + 1) % size == 0:
            return


def _warn(message: str) -> None:
    # Each process has its own shards; `console.warn` prints in the main process only.
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _is_shard(name: str) -> bool:
    return re.fullmatch(r"part-\d{6,}\.parquet", name) is not None


def _metadata(path: Path) -> tuple[dict[str, Any], dict[str, int]] | None:
    """Return settings and place of a shard; None if it is damaged."""
    try:
        content = json.loads(parquet.read_metadata(path).metadata[METADATA.encode()])
        return content["settings"], content["place"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder of predictions.

    Raises:
        InputError: It is missing, or not the manifest of predictions.
    """
    path = folder / MANIFEST
    manifest = read_json(path, LARGEST_MANIFEST)
    try:
        for shard in manifest["shards"]:
            Shard(**shard)
        if not isinstance(manifest["complete"], bool) or not isinstance(manifest["settings"], dict):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not the manifest of predictions; name another folder", "output") from error
    return manifest


def shard_schema(labelled: bool, embeddings: bool) -> pa.Schema:
    """Return the columns of a shard.

    Args:
        labelled: Whether the images have labels.
        embeddings: Whether to include embeddings.
    """
    fields = [pa.field("index", pa.int64()), pa.field("path", pa.string())]
    fields += [pa.field("label", pa.int64())] * labelled
    fields += [
        pa.field("classes", pa.list_(pa.int32())),
        pa.field("names", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
    ]
    return pa.schema(fields + [pa.field("embedding", pa.list_(pa.float32()))] * embeddings)


def shard_table(predictions: Sequence[Prediction], names: list[str], schema: pa.Schema) -> pa.Table:
    """Return predictions as rows of a shard."""
    columns: dict[str, Any] = {
        "index": [prediction.index for prediction in predictions],
        "path": [None if prediction.path is None else utf8(prediction.path) for prediction in predictions],
        "label": [prediction.label for prediction in predictions],
        "classes": [prediction.classes for prediction in predictions],
        "names": [[names[index] for index in prediction.classes] for prediction in predictions],
        "scores": [prediction.scores for prediction in predictions],
    }
    if "embedding" in schema.names:
        columns["embedding"] = [prediction.embedding.numpy() for prediction in predictions]  # type: ignore[union-attr]
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)
