"""Sources of labelled images: class folders, files and Hub datasets, read through `datasets`."""

import contextlib
import difflib
import glob
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from pyarrow import parquet

from res2net_zoo.data.images import (
    HIDDEN,
    LINKS,
    ImageFiles,
    Sample,
    Samples,
    Skipped,
    identity,
    images_below,
    is_hidden,
    is_image,
    read_named,
    walk,
)
from res2net_zoo.data.webdataset import read_shards
from res2net_zoo.utils.card_metadata import LOADER, check_yaml
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import LARGEST_TEXT, check_writable, open_regular, read_json, read_text
from res2net_zoo.utils.private_apis import row_indices

# Common names of splits, and the names that `datasets` uses for them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# Supported builders of `datasets`; others follow links or run parsers that are not needed here.
READERS = ("imagefolder", "parquet", "arrow", "webdataset", "json", "csv")
HUB_TIMEOUT = 10  # seconds for the request whether a dataset exists
MAX_PARTS = 1024  # shards of a stream that is not stored in files
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
MOST_CLASSES = 1_000_000  # limit for labels, because time and memory grow with the largest one
LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")


@dataclass
class Source:
    """One split of labelled images.

    Attributes:
        name: The Hub id, or the name of the folder or file.
        split: The split.
        rows: Map-style or iterable dataset with the columns `image` (undecoded) and `label`.
        class_names: Name of each label, if known.
        num_rows: Number of images, if known before they are read.
        read: Returns the content of a row's image.
        skipped: Numbers of skipped files and folders, by reason.
    """

    name: str
    split: str
    rows: datasets.Dataset | datasets.IterableDataset
    class_names: list[str] | None
    num_rows: int | None
    read: Callable[[dict[str, Any]], bytes] = ImageFiles().read
    skipped: str = ""


def open_source(
    src: str,
    split: str | None = None,
    *,
    streaming: bool = False,
    label_column: str | None = None,
    labelled: bool = True,
) -> Source:
    """Open one split of labelled images.

    Args:
        src: A Hub dataset id, a folder (of class folders, of splits of class folders, of Parquet,
            Arrow or WebDataset files, or written by `save_to_disk`), such a file, or a pattern for
            such files.
        split: The split; default the validation split, else the test split, else the only one.
            `SPLIT/held-out-FRACTION-SEED` is the part that `hold_out` takes from a split.
        streaming: Whether to read the images in order, without converting them to the local cache
            first.
        label_column: Name of the column with the labels, if it has an unusual name.
        labelled: Whether labels are required; otherwise they are optional.

    Returns:
        The split. Its images are not decoded yet: bytes or paths.

    Raises:
        InputError: The data, the split or a column does not exist, or cannot be read.
    """
    if held := held_out_of(split):
        if streaming:
            raise InputError(f"nothing can be held out of a stream; read {src} without streaming", "streaming")
        return hold_out(open_source(src, held[0], label_column=label_column), *held[1:])[1]
    with _reporting(src):
        src = _expanded(src)
        splits, load = _find(src)
        split = _choose_split(src, splits, split)
        return _describe(src, split, load(split, streaming), label_column, labelled)


def splits_of(src: str) -> list[str]:
    """Return the names of the splits of labelled images.

    Args:
        src: As for `open_source`.

    Raises:
        InputError: The data does not exist, or cannot be read.
    """
    with _reporting(src):
        return _find(_expanded(src))[0]


def _expanded(src: str) -> str:
    return src if Path(src).exists() else os.path.expanduser(src)


@contextlib.contextmanager
def _reporting(src: str) -> Iterator[None]:
    """Turn the errors of `datasets` and of its readers into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # `datasets` wraps the errors of its readers (tarfile, pyarrow, the network, the operating
        # system) in its own types; only the innermost message is useful.
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            _check_caches()
        if isinstance(cause, UnicodeEncodeError):
            odd = printable(cause.object[-200:])
            raise InputError(f"cannot read the data {src}: the name {odd} is not UTF-8; rename it") from error
        raise InputError(f"cannot read the data {src}: {str(cause).strip() or type(cause).__name__}") from error


def _check_caches() -> None:
    """Check that the caches are writable; `datasets` would report an error of the data instead.

    Raises:
        InputError: A cache is not writable.
    """
    caches = (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    for cache in map(Path, caches):
        try:
            check_writable(next(path for path in (cache, *cache.absolute().parents) if path.exists()))
        except InputError as error:
            reason = getattr(error.__cause__, "strerror", "")
            raise InputError(
                f"cannot write into the cache {cache}: {reason}; set HF_HOME to a writable folder"
            ) from error


def held_out_of(split: str | None) -> tuple[str, float, int] | None:
    """Return split, fraction and seed of the name of a held-out split; None for other splits."""
    held = re.fullmatch(r"(.+)/held-out-(\d+(?:\.\d+)?(?:e-\d+)?)-(\d+)", split or "")
    return (held[1], float(held[2]), int(held[3])) if held and 0 < float(held[2]) < 1 else None


def labels_of(source: Source) -> np.ndarray:
    """Return the label of each image of a map-style source, -1 if missing.

    Raises:
        InputError: A label is less than -1, or not below the limit (`MOST_CLASSES`).
    """
    labels = source.rows.data.column("label") if isinstance(source.rows, datasets.Dataset) else None
    assert labels is not None
    if (indices := row_indices(source.rows)) is not None:  # some of the rows
        labels = labels.take(indices.column(0).combine_chunks())
    bounds = pc.min_max(labels).as_py()
    if labels.null_count < len(labels) and (bounds["min"] < -1 or bounds["max"] >= MOST_CLASSES):
        values = enumerate(labels.to_pylist())
        first, label = next((i, x) for i, x in values if x is not None and not -1 <= x < MOST_CLASSES)
        raise InputError(
            f"image {first} of {source.split} in {source.name} has label {label}; labels go from 0 to "
            f"{MOST_CLASSES - 1} at most"
        )
    return labels.cast(pa.int64()).fill_null(-1).to_numpy()


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Split images in two parts, with the same share of each class. Deterministic.

    Args:
        source: Map-style labelled images.
        fraction: Share of each class's images to hold out, at least one image.
        seed: Seed of the random selection.

    Returns:
        The remaining part, and the held-out part, whose split has a name that `open_source`
        accepts.

    Raises:
        InputError: A label is missing, or a class has too few images for both parts.
    """
    fraction = float(f"{fraction:g}")  # as in the split's name
    labels = labels_of(source)
    if (labels < 0).any():
        raise InputError(f"image {np.argmax(labels < 0)} of {source.split} in {source.name} has no label")
    held = []
    for label in np.unique(labels):
        members = np.random.default_rng([seed, int(label) + 1]).permutation(np.flatnonzero(labels == label))
        number = max(1, round(fraction * len(members)))
        if number >= len(members):
            name = source.class_names[label] if source.class_names else label
            raise InputError(
                f"{source.name} has {len(members)} image{'s' * (len(members) != 1)} of class {name}, too few to hold "
                f"{fraction:g} of them out for validation; add some, or name another split to evaluate on",
                *("eval_split", "split"),
            )
        held.append(members[:number])
    chosen = np.sort(np.concatenate(held))
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    split = f"{source.split}/held-out-{fraction:g}-{seed}"
    return (
        replace(source, rows=source.rows.select(rest), num_rows=len(rest)),
        replace(source, rows=source.rows.select(chosen), num_rows=len(chosen), split=split),
    )


class Rows(NamedTuple):
    """The rows of one split.

    Attributes:
        rows: Map-style or iterable dataset.
        num_rows: Number of rows, if known before they are read.
        read: Returns the content of a row's image.
        skipped: As for `Source`.
    """

    rows: Any
    num_rows: int | None
    read: Callable[[dict[str, Any]], bytes]
    skipped: str = ""


def _find(src: str) -> tuple[list[str], Callable[[str, bool], Rows]]:
    """Return the splits of `src`, and a function that loads one of them."""
    path = Path(src)
    if not src:
        raise InputError("the data's name is empty; name a folder, a file or a Hub dataset id ORG/NAME")
    if path.is_dir():
        for name in ("README.md", ".huggingface.yaml"):
            _check_configs(path / name)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _find_saved(path)
        if folders := _class_folders(path):
            return list(folders), lambda split, streaming: _load_class_folders(folders[split], streaming)
        builder = datasets.load_dataset_builder(str(path))
        if builder.name == "imagefolder" and (beside := [p for p in path.iterdir() if _is_data(p)]):
            raise InputError(
                f"{src} has images and also {beside[0].name}; move that elsewhere to read the images, or name the "
                "file to read it"
            )
    elif matches := sorted(glob.glob(src)):
        kinds = {FILE_FORMATS.get(Path(match).suffix) for match in matches}
        kind = kinds.pop()
        if kinds or kind is None:
            raise InputError(f"{src} must be files of one format ({', '.join(FILE_FORMATS)}) or a folder")
        files: dict[str, list[str]] = {}
        for match in map(Path, matches):
            split = _split_in(match.name) or _split_in(match.absolute().parent.name) or "train"
            files.setdefault(split, []).append(glob.escape(str(match)))
        builder = datasets.load_dataset_builder(kind, data_files=files)
    else:
        _check_on_hub(src)
        with contextlib.suppress(HTTPError, HFValidationError, OSError):  # reported by `datasets`
            _check_configs(Path(hf_hub_download(src, "README.md", repo_type="dataset")))
        builder = datasets.load_dataset_builder(src)

    if builder.name not in READERS:
        raise InputError(f"{src}: files of type {builder.name} are not supported; use {', '.join(READERS)}")
    data_files = builder.config.data_files

    def load(split: str, streaming: bool) -> Rows:
        members = [name for file in data_files[split] for name in _members(Path(file))]
        # Pass only this split's files, or `datasets` would download and convert all splits. Names are
        # escaped because it interprets them as patterns.
        files = {split: [glob.escape(file) for file in data_files[split]]}
        if builder.name == "webdataset":
            rows = read_shards(files, members, split, streaming)
        else:
            rows = datasets.load_dataset(
                builder.name, data_files=files, split=split, features=builder.info.features, streaming=streaming
            )
        read = _image_files(src, builder.name, data_files[split]).read
        if not streaming:
            return Rows(rows, len(rows), read)
        if builder.name == "parquet" and all(Path(file).is_file() for file in data_files[split]):
            return Rows(rows, sum(parquet.read_metadata(file).num_rows for file in data_files[split]), read)
        known = (builder.info.splits or {}).get(split)  # may be in the repository's card
        return Rows(rows, known.num_examples if known and known.num_examples else None, read)

    return list(data_files), load


def _check_on_hub(src: str) -> None:
    """Check that a name that is not a local file or folder exists on the Hub.

    `datasets` would retry for half a minute before it reports a misspelt name.

    Raises:
        InputError: The name is a path, does not exist on the Hub, or the Hub is not reachable.
    """
    folder, name = os.path.split(src.rstrip("/"))
    names = os.listdir(folder or os.curdir) if os.path.isdir(folder or os.curdir) else []
    close = difflib.get_close_matches(name, names, n=3)
    missing = f"there is no folder or file {src}"
    hint = f"did you mean {' or '.join(os.path.join(folder, match) for match in close)}?" if close else ""
    suffix = Path(src).suffix
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", src) or ".." in src or suffix in FILE_FORMATS:
        raise InputError(f"{missing}; {hint or 'name a folder, a file, or a Hub dataset id ORG/NAME'}")
    try:
        HfApi().dataset_info(src, timeout=HUB_TIMEOUT)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 404):
            return  # `datasets` reports other errors
        hint = hint or "check the name, and for a private dataset log in with `hf auth login`"
        raise InputError(f"{missing}, and no dataset of this name on the Hub; {hint}") from error
    except OfflineModeIsEnabled as error:
        raise InputError(
            f"{missing}; {hint or 'the Hub cannot be reached in offline mode (HF_HUB_OFFLINE)'}"
        ) from error
    except (HTTPError, OSError) as error:
        raise InputError(f"{missing}, and the Hub cannot be reached; {hint or 'check the network'}") from error


def _check_configs(card: Path) -> None:
    """Check that the `configs` of a dataset card refer only to files of the dataset, and to no other protocol.

    Raises:
        InputError: A data file is outside of the dataset, or the metadata is invalid.
    """
    if not card.is_file():
        return
    text = read_text(card)
    block = REGEX_YAML_BLOCK.search(text)  # the same expression as in `datasets`
    try:
        metadata = text if card.suffix == ".yaml" else block[2] if block else ""
        check_yaml(metadata)
        content = yaml.load(metadata, Loader=LOADER)
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"cannot read the metadata of {card}: {one_line(error)}") from error
    patterns = [content.get("configs") if isinstance(content, dict) else None]
    while patterns:
        pattern = patterns.pop()
        if isinstance(pattern, dict | list):
            patterns += pattern.values() if isinstance(pattern, dict) else pattern
        elif isinstance(pattern, str):
            outside = os.path.isabs(pattern) or ".." in Path(pattern).parts
            if outside or "::" in pattern or ("://" in pattern and not pattern.startswith("hf://")):
                raise InputError(f"{card} names the data file {pattern}; only files of the dataset itself are read")


def _image_files(src: str, reader: str, data_files: Sequence[str]) -> ImageFiles:
    """Return the files that may be read for images that the data files refer to by path."""
    is_local = os.path.isdir(src) or not data_files[0].startswith("hf://")
    if reader != "imagefolder":
        folder = os.path.commonpath([os.path.dirname(file) for file in data_files])
        return ImageFiles(Path(folder) if is_local else None)
    # The paths are those of files that `datasets` itself has listed, or downloaded to its caches.
    home = [f"hf://datasets/{src}@", f"hf://datasets/{src}/"]
    places = (src, datasets.config.EXTRACTED_DATASETS_PATH, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return ImageFiles(listed=(*home, *(f"{os.path.abspath(place)}{os.sep}" for place in places)))


def _members(path: Path) -> list[str]:
    """Return the names of the files in a local tar file; empty for other files.

    Raises:
        InputError: The file is truncated or damaged, which readers would not notice.
    """
    if path.suffix != ".tar" or not path.is_file():
        return []
    end = 0
    names = []
    try:
        with tarfile.open(path, "r:") as tar:  # reads the headers only
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                names += [member.name] * member.isfile()
    except tarfile.TarError as error:
        raise InputError(f"{path} is not a complete tar file ({error}); download it again") from error
    with path.open("rb") as file:
        file.seek(end)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise InputError(f"{path} is truncated or damaged at byte {end}; download it again")
    return names


def _check_saved(path: Path) -> None:
    """Check that the files of a dataset written by `save_to_disk` are regular files in its folder.

    `datasets` opens any path in the list: a pipe would block it forever, and another path may leave the folder.

    Raises:
        InputError: A file is not in the folder, or the list is invalid.
    """
    folders = [path]
    try:
        if (path / "dataset_dict.json").is_file():
            folders += [path / _own_name(name) for name in read_json(path / "dataset_dict.json")["splits"]]
        for folder in folders:
            if (folder / "state.json").is_file():
                for file in read_json(folder / "state.json")["_data_files"]:
                    with open_regular(folder / _own_name(file["filename"])):
                        pass
    except (KeyError, TypeError) as error:
        raise InputError(f"cannot read the data {path}: its list of files is invalid") from error


def _own_name(name: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise InputError(f"the data refer to {name}, which is outside of their folder; only their own files are read")
    return name


def _find_saved(path: Path) -> tuple[list[str], Callable[[str, bool], Rows]]:
    _check_saved(path)
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        saved = datasets.DatasetDict({_split_in(path.name) or "train": saved})

    def load(split: str, streaming: bool) -> Rows:
        rows = saved[split]
        # Enough shards for all processes and workers.
        parts = min(max(1, len(rows)), MAX_PARTS)
        read = ImageFiles(path).read
        return Rows(rows.to_iterable_dataset(num_shards=parts) if streaming else rows, len(rows), read)

    return list(saved), load


def _class_folders(path: Path) -> dict[str, Path] | None:
    """Return the folder of each split if `path` contains class folders, or splits with class folders.

    The builder of `datasets` for class folders treats a class called `test tube` as a test split
    and a name with a bracket as a pattern, ignores the label of a single class and does not follow links.

    Raises:
        InputError: Folders of splits and of other names are mixed, or two folders are the same split.
    """
    folders = _folders(path, Skipped())
    files = [p for p in path.iterdir() if p.is_file()]
    # If a card or a metadata file describes the data, `datasets` reads it.
    configured = any(file.name == "README.md" and b"\nconfigs:" in _head(file) for file in files)
    described = any(_describes_images(place / name) for place in (path, *folders) for name in METADATA)
    if configured or described or any(map(_is_data, files)):
        return None
    if not any(map(_has_image, folders)):
        return None
    splits: dict[str, Path] = {}
    for folder in folders:
        split = SPLITS.get(folder.name.lower())
        if split is None or not any(map(_has_image, _folders(folder, Skipped()))):
            continue
        if split in splits:
            raise InputError(
                f"{path} has two folders for the split {split}, {splits[split].name} and {folder.name}; "
                "name the folder of one split, or rename one of them"
            )
        splits[split] = folder
    if not splits:
        return {_split_in(path.name) or "train": path}
    if others := [folder.name for folder in folders if folder.name.lower() not in SPLITS and _has_image(folder)]:
        names = ", ".join(folder.name for folder in splits.values())
        raise InputError(
            f"{path} has folders named as splits with folders of images in them ({names}) next to others with images "
            f"({', '.join(others[:3])}{', ...' * (len(others) > 3)}): name the folder of one split if they are splits, "
            "or rename them if they are classes"
        )
    return splits


def _folders(path: Path, skipped: Skipped) -> list[Path]:
    """Return the subfolders of a folder, each once, without hidden and system folders and parents of `path`."""
    above = {identity(parent) for parent in (path.resolve(), *path.resolve().parents)}
    found: dict[tuple[int, int], Path] = {}
    for folder in sorted((p for p in path.iterdir() if p.is_dir()), key=lambda p: (p.is_symlink(), p)):
        key = identity(folder)
        if is_hidden(folder.name):
            skipped.add(HIDDEN, str(folder))
        elif key in found or key in above:
            skipped.add(LINKS, str(folder))
        else:
            found[key] = folder
    return sorted(found.values())


def _is_data(path: Path) -> bool:
    return path.suffix in FILE_FORMATS and path.name not in METADATA


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LARGEST_TEXT)


def _describes_images(path: Path) -> bool:
    """Return whether a file with a name in `METADATA` has a column of file names, as `datasets` requires."""
    if not path.is_file():
        return False
    try:
        if path.suffix == ".parquet":
            columns = parquet.read_schema(path).names
        else:
            line = _head(path).decode("utf-8-sig", errors="replace").partition("\n")[0]
            columns = list(json.loads(line)) if path.suffix == ".jsonl" else line.strip().split(",")
    except (pa.ArrowException, ValueError, TypeError, RecursionError):
        return False
    return any(str(column).strip('"').endswith(("file_name", "file_names")) for column in columns)


def _has_image(path: Path) -> bool:
    return any(is_image(name) for _, name in walk(str(path), set(), Skipped()))


def _load_class_folders(path: Path, streaming: bool) -> Rows:
    skipped = Skipped()
    folders = _folders(path, skipped)
    seen = {identity(folder) for folder in folders}
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = images_below(str(folder), seen, skipped)
        files += images
        labels += [label] * len(images)
        if not images:
            skipped.add("class folders without images", str(folder))
    for file in map(Path, skipped.files):
        if _is_data(file) or (file.name in METADATA and _describes_images(file)):
            raise InputError(
                f"{path} has images in class folders and also {file}; move that elsewhere to read the images, or name "
                "the file or its folder to read it"
            )
    if not files:
        raise InputError(f"{path} has no image in its class folders")
    for entry in path.iterdir():
        if is_image(entry.name) and not is_hidden(entry.name) and entry.is_file():
            skipped.add("images outside of class folders", str(entry))
    names = [folder.name for folder in folders]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    images_column = [{"bytes": None, "path": file} for file in files]
    rows = datasets.Dataset.from_dict({"image": images_column, "label": labels}, features=features)
    number = len(rows)
    parts = min(number, MAX_PARTS)
    return Rows(rows.to_iterable_dataset(num_shards=parts) if streaming else rows, number, read_named, str(skipped))


def _split_in(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _choose_split(src: str, splits: list[str], wanted: str | None) -> str:
    if wanted is None:
        for name in ("validation", "test"):
            if name in splits:
                return name
        if len(splits) == 1:
            return splits[0]
        raise InputError(f"{src} has several splits; choose one: {', '.join(splits)}", "split")
    for name in (wanted, SPLITS.get(wanted, wanted)):
        if name in splits:
            return name
    raise InputError(f"{src} has no split {wanted}; it has {', '.join(splits)}")


def _describe(src: str, split: str, loaded: Rows, label_column: str | None, labelled: bool) -> Source:
    rows, num_rows, read, skipped = loaded
    features = rows.features
    if features is None:
        raise InputError(f"{src} does not define its columns; read it without streaming", "streaming")
    images = [name for name in IMAGE_COLUMNS if name in features and _may_be_images(features[name])]
    images += [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise InputError(f"{src} has no column of images; its columns are {', '.join(features)}")
    if label_column is not None and label_column not in features:
        raise InputError(f"{src} has no column {label_column}; its columns are {', '.join(features)}")
    labels = [label_column] if label_column else [name for name in LABEL_COLUMNS if name in features]
    labels += [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels and labelled:
        raise InputError(f"{src} has no column of labels; name one: {', '.join(features)}", "label_column")
    if not labelled and label_column is None:
        labels = [name for name in labels if _may_be_labels(features[name])]
    label = features[labels[0]] if labels else None
    if label is not None and not _may_be_labels(label):
        raise InputError(f"column {labels[0]} of {src} has no integer class labels; name another", "label_column")
    # Disable decoding: `datasets` would apply the EXIF orientation, which timm does not, and one
    # corrupt image would end a stream. This comes first, because streams decode rows when columns
    # are renamed.
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    columns = {images[0]: "image"} | ({labels[0]: "label"} if labels else {})
    rows = rows.select_columns(list(columns))
    rows = rows.rename_columns({old: new for old, new in columns.items() if old != new})
    return Source(
        name=src if not Path(src).exists() and not glob.has_magic(src) else Path(src).resolve().name,
        split=str(split),  # `datasets` uses a subclass of str
        rows=rows,
        class_names=list(label.names) if isinstance(label, datasets.ClassLabel) else None,
        num_rows=num_rows,
        read=read,
        skipped=skipped,
    )


def _may_be_images(feature: Any) -> bool:
    """Return whether a column may contain images: as such, or as bytes or paths."""
    return isinstance(feature, datasets.Image | dict) or getattr(feature, "dtype", "").removeprefix("large_") in (
        "binary",
        "string",
    )


def _may_be_labels(feature: Any) -> bool:
    # A ClassLabel's type is int64.
    return re.fullmatch(r"u?int\d+", getattr(feature, "dtype", "")) is not None


class StreamSamples(torch.utils.data.IterableDataset):
    """Samples of an iterable dataset, in order; `datasets` distributes its shards among the workers.

    Args:
        rows: The rows.
        samples: Converts them to samples.
        name: Name of these rows in messages; their position in the whole dataset is unknown.
    """

    def __init__(self, rows: datasets.IterableDataset, samples: Samples, name: str) -> None:
        self.rows = rows
        self.samples = samples
        self.name = name

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        name = self.name if worker is None or worker.num_workers == 1 else f"{self.name}, worker {worker.id}"
        done = 0
        try:
            for row in self.rows:
                yield self.samples(f"image {done} of {name}", row)
                done += 1
        except Exception as error:
            # `datasets` raises various errors for truncated or invalid files.
            fatal = f"cannot continue after {done} images: {str(error) or type(error).__name__}"
            yield Sample(name, fatal=fatal)
