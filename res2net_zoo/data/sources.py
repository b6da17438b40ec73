"""From a source of images to batches: reading through `datasets`, labels, timm's transform."""

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

# The words by which people and `datasets` name splits, and the name that `datasets` gives them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# Builders of `datasets` that images are read by; others follow links or run parsers that nothing here needs.
READERS = ("imagefolder", "parquet", "arrow", "webdataset", "json", "csv")
HUB_TIMEOUT = 10  # seconds for its answer to whether it has a data set
MAX_PARTS = 1024  # of a stream that has no files of its own
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
MOST_CLASSES = 1_000_000  # more than any data set has; work and memory grow with the largest label
LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")


@dataclass
class Source:
    """One split of labelled images.

    Attributes:
        name: The Hub's id, or the name of the folder or file.
        split: Its split.
        rows: Map-style or iterable dataset with the columns `image` (undecoded) and `label`.
        class_names: Name of each label, where the data names them.
        num_rows: Number of images, where it is known before they are read.
        read: From an image of a row to its content.
        skipped: Counts of what is there and was left out, and why.
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
            Arrow or WebDataset files, or made by `save_to_disk`), such a file, or a pattern of
            such files.
        split: Which split; default the validation split, else the test split, else the only one.
            `SPLIT/held-out-FRACTION-SEED` is what `hold_out` takes from one.
        streaming: Whether to read the images in order as they come, converting nothing into the
            local cache first.
        label_column: Name of the column with the labels, where it is not plain.
        labelled: Whether the images must have labels; where they need none, they may have some.

    Returns:
        The split. Its images are not decoded yet: bytes or paths.

    Raises:
        InputError: No such data, split or column, or it cannot be read.
    """
    if held := held_out_of(split):
        if streaming:
            raise InputError(f"nothing can be held out of a stream; read {src} without --streaming")
        return hold_out(open_source(src, held[0], label_column=label_column), *held[1:])[1]
    src = src if Path(src).exists() else os.path.expanduser(src)
    try:
        splits, load = _find(src)
        split = _choose_split(src, splits, split)
        return _describe(src, split, load(split, streaming), label_column, labelled)
    except InputError:
        raise
    except Exception as error:
        # `datasets` wraps whatever its readers raise (tarfile, pyarrow, the network, the operating
        # system) in types of its own; all that a user can do is in the innermost message.
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            _check_caches()
        if isinstance(cause, UnicodeEncodeError):
            odd = printable(cause.object[-200:])
            raise InputError(f"cannot read the data {src}: the name {odd} is not UTF-8; rename it") from error
        raise InputError(f"cannot read the data {src}: {str(cause).strip() or type(cause).__name__}") from error


def _check_caches() -> None:
    """Refuse caches that cannot be written, where `datasets` names the data that it was to convert into them.

    Raises:
        InputError: One cannot be written.
    """
    caches = (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    for cache in map(Path, caches):
        try:
            check_writable(next(path for path in (cache, *cache.absolute().parents) if path.exists()))
        except InputError as error:
            reason = getattr(error.__cause__, "strerror", "")
            raise InputError(
                f"cannot write into the cache {cache}: {reason}; set HF_HOME to a folder that can be written"
            ) from error


def held_out_of(split: str | None) -> tuple[str, float, int] | None:
    """Return the split, fraction and seed of what `hold_out` has named, None for other splits."""
    held = re.fullmatch(r"(.+)/held-out-(\d+(?:\.\d+)?(?:e-\d+)?)-(\d+)", split or "")
    return (held[1], float(held[2]), int(held[3])) if held and 0 < float(held[2]) < 1 else None


def labels_of(source: Source) -> np.ndarray:
    """Return the label of each image of a map-style source, -1 where it has none.

    Raises:
        InputError: A label is less than -1, or too large for any data set (`MOST_CLASSES`).
    """
    labels = source.rows.data.column("label") if isinstance(source.rows, datasets.Dataset) else None
    assert labels is not None
    if source.rows._indices is not None:  # some of the rows
        labels = labels.take(source.rows._indices.column(0).combine_chunks())
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
    """Split images in two, with the same share of each class; the same two for the same arguments.

    Args:
        source: Map-style labelled images.
        fraction: Share of each class's images to hold out, at least one image.
        seed: Chooses them.

    Returns:
        Those that are left, and those that are held out, whose split is named so that `open_source`
        finds them again.

    Raises:
        InputError: An image has no label, or a class has too few images to be on both sides.
    """
    fraction = float(f"{fraction:g}")  # as the split's name says it
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
                f"{fraction:g} of them out for validation; add some, or name a split with --eval-split"
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
    """The rows of one split as `datasets` gives them.

    Attributes:
        rows: Map-style or iterable dataset.
        num_rows: Their number, where it is known before they are read.
        read: From an image of a row to its content.
        skipped: As for `Source`.
    """

    rows: Any
    num_rows: int | None
    read: Callable[[dict[str, Any]], bytes]
    skipped: str = ""


def _find(src: str) -> tuple[list[str], Callable[[str, bool], Rows]]:
    """Return the splits of `src`, and what loads one of them."""
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
                f"{src} has images and also {beside[0].name}; move that elsewhere to read the images, or name it to "
                "read it"
            )
    elif matches := sorted(glob.glob(src)):
        kinds = {FILE_FORMATS.get(Path(match).suffix) for match in matches}
        kind = kinds.pop()
        if kinds or kind is None:
            raise InputError(f"{src} is no {', no '.join(FILE_FORMATS)} file; name one kind of those, or a folder")
        files: dict[str, list[str]] = {}
        for match in map(Path, matches):
            split = _split_in(match.name) or _split_in(match.absolute().parent.name) or "train"
            files.setdefault(split, []).append(glob.escape(str(match)))
        builder = datasets.load_dataset_builder(kind, data_files=files)
    else:
        _check_on_hub(src)
        with contextlib.suppress(HTTPError, HFValidationError, OSError):  # `datasets` reports those itself
            _check_configs(Path(hf_hub_download(src, "README.md", repo_type="dataset")))
        builder = datasets.load_dataset_builder(src)

    if builder.name not in READERS:
        raise InputError(f"{src} has files that `datasets` reads as {builder.name}; there are {', '.join(READERS)}")
    data_files = builder.config.data_files

    def load(split: str, streaming: bool) -> Rows:
        members = [name for file in data_files[split] for name in _members(Path(file))]
        # Only this split's files are named, or `datasets` would fetch and convert all splits. It
        # takes names for patterns.
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
        known = (builder.info.splits or {}).get(split)  # a repository's card may say
        return Rows(rows, known.num_examples if known and known.num_examples else None, read)

    return list(data_files), load


def _check_on_hub(src: str) -> None:
    """Refuse a name that is none of a file or folder here, and cannot be or is not found on the Hub.

    `datasets` would try for half a minute to reach the Hub before it reports a misspelt name.

    Raises:
        InputError: It is a path, the Hub does not have it, or cannot be reached.
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
            return  # `datasets` reports what else the Hub answers
        hint = hint or "check the name, and for a private data set log in with `hf auth login`"
        raise InputError(f"{missing}, and no data set of this name on the Hub; {hint}") from error
    except OfflineModeIsEnabled as error:
        raise InputError(
            f"{missing}; {hint or 'the Hub cannot be reached in offline mode (HF_HUB_OFFLINE)'}"
        ) from error
    except (HTTPError, OSError) as error:
        raise InputError(f"{missing}, and the Hub cannot be reached; {hint or 'check the network'}") from error


def _check_configs(card: Path) -> None:
    """Refuse a card whose `configs` name data files outside of the dataset, or a protocol to open them by.

    Raises:
        InputError: It does.
    """
    if not card.is_file():
        return
    text = read_text(card)
    block = REGEX_YAML_BLOCK.search(text)  # as `datasets` finds it
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
    """Return where the images of some data files may be read from, where their content is not in them."""
    is_local = os.path.isdir(src) or not data_files[0].startswith("hf://")
    if reader != "imagefolder":
        folder = os.path.commonpath([os.path.dirname(file) for file in data_files])
        return ImageFiles(Path(folder) if is_local else None)
    # Its paths are those of the files that `datasets` has found there itself, or has fetched into its caches.
    home = [f"hf://datasets/{src}@", f"hf://datasets/{src}/"]
    places = (src, datasets.config.EXTRACTED_DATASETS_PATH, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return ImageFiles(listed=(*home, *(f"{os.path.abspath(place)}{os.sep}" for place in places)))


def _members(path: Path) -> list[str]:
    """Return the names of the files in a tar file; empty for another, or one on the Hub.

    Raises:
        InputError: It was cut off or damaged, and its readers would take it for a shorter one.
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
        raise InputError(f"{path} is no whole tar file ({error}); fetch it again") from error
    with path.open("rb") as file:
        file.seek(end)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise InputError(f"{path} was cut off or damaged at byte {end}; fetch it again")
    return names


def _check_saved(path: Path) -> None:
    """Check that what `save_to_disk` is said to have written are regular files of the folder itself.

    `datasets` opens whatever is named: a pipe would hold it up for good, another path leads out of the folder.

    Raises:
        InputError: They are not.
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
        raise InputError(f"cannot read the data {path}: its list of files is not one of save_to_disk") from error


def _own_name(name: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise InputError(f"the data name {name}, which is not in their own folder; only files of the data are read")
    return name


def _find_saved(path: Path) -> tuple[list[str], Callable[[str, bool], Rows]]:
    _check_saved(path)
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        saved = datasets.DatasetDict({_split_in(path.name) or "train": saved})

    def load(split: str, streaming: bool) -> Rows:
        rows = saved[split]
        # As many parts as there may be processes and loaders to share them.
        parts = min(max(1, len(rows)), MAX_PARTS)
        read = ImageFiles(path).read
        return Rows(rows.to_iterable_dataset(num_shards=parts) if streaming else rows, len(rows), read)

    return list(saved), load


def _class_folders(path: Path) -> dict[str, Path] | None:
    """Return the folder of each split if `path` holds class folders, or splits of class folders.

    `datasets` has a builder for them, which takes a class called `test tube` for a test split, a
    name with a bracket for a pattern, gives a single class no label and does not follow links.

    Raises:
        InputError: Some folders are named as splits and others as classes, or two as the same split.
    """
    folders = _folders(path, Skipped())
    files = [p for p in path.iterdir() if p.is_file()]
    # Where something else than the folders' names says what is what, `datasets` shall read that.
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
            f"{path} has folders named as splits with folders of images in them ({names}) beside others with images "
            f"({', '.join(others[:3])}{', ...' * (len(others) > 3)}): name the folder of one split if they are splits, "
            "or rename them if they are classes"
        )
    return splits


def _folders(path: Path, skipped: Skipped) -> list[Path]:
    """Return the folders in a folder: each real one once, and none that is hidden, a system's own or above `path`."""
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
    """Return whether a file of a name in `METADATA` is what `datasets` goes by: names of images, and data of each."""
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
                "it or its folder to read it"
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
        raise InputError(f"{src} has several splits; choose one with --split: {', '.join(splits)}")
    for name in (wanted, SPLITS.get(wanted, wanted)):
        if name in splits:
            return name
    raise InputError(f"{src} has no split {wanted}; it has {', '.join(splits)}")


def _describe(src: str, split: str, loaded: Rows, label_column: str | None, labelled: bool) -> Source:
    rows, num_rows, read, skipped = loaded
    features = rows.features
    if features is None:
        raise InputError(f"{src} does not say what its columns are; read it without --streaming")
    images = [name for name in IMAGE_COLUMNS if name in features and _may_be_images(features[name])]
    images += [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise InputError(f"{src} has no column of images; its columns are {', '.join(features)}")
    if label_column is not None and label_column not in features:
        raise InputError(f"{src} has no column {label_column}; its columns are {', '.join(features)}")
    labels = [label_column] if label_column else [name for name in LABEL_COLUMNS if name in features]
    labels += [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels and labelled:
        raise InputError(f"{src} has no column of labels; name one with --label-column: {', '.join(features)}")
    label = features[labels[0]] if labels else None
    kind = "int64" if label is None else getattr(label, "dtype", "")  # a ClassLabel's is int64, too
    if not re.fullmatch(r"u?int\d+", kind):
        raise InputError(f"column {labels[0]} of {src} holds no class numbers; name another with --label-column")
    # Decoding is ours: `datasets` would turn images by their EXIF orientation, which timm does not,
    # and one corrupt image would end a whole stream. First of all, for a stream decodes its rows
    # as soon as they are mapped to others, as renaming does.
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    columns = {images[0]: "image"} | ({labels[0]: "label"} if labels else {})
    rows = rows.select_columns(list(columns))
    rows = rows.rename_columns({old: new for old, new in columns.items() if old != new})
    return Source(
        name=src if not Path(src).exists() and not glob.has_magic(src) else Path(src).resolve().name,
        split=str(split),  # not a type of `datasets` of its own
        rows=rows,
        class_names=list(label.names) if isinstance(label, datasets.ClassLabel) else None,
        num_rows=num_rows,
        read=read,
        skipped=skipped,
    )


def _may_be_images(feature: Any) -> bool:
    """Tell whether a column holds images, or bytes or paths or both that can be some."""
    return isinstance(feature, datasets.Image | dict) or getattr(feature, "dtype", "").removeprefix("large_") in (
        "binary",
        "string",
    )


class StreamSamples(torch.utils.data.IterableDataset):
    """Samples of an iterable dataset, in order; `datasets` shares its files among the workers.

    Args:
        rows: The rows.
        samples: Makes samples of them.
        name: What to call these rows in a message; their place in the whole is not known.
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
            # A file that ends too early or is none of its kind; `datasets` has no one type for it.
            fatal = f"cannot read on after {done} images: {str(error) or type(error).__name__}"
            yield Sample(name, fatal=fatal)
