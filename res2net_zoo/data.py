"""From a source of images to batches: reading through `datasets`, labels, timm's transform."""

import contextlib
import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError, HTTPError
from pyarrow import parquet
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from res2net_zoo.files import read_text
from res2net_zoo.images import ImageFiles, Sample, Samples, read_named
from res2net_zoo.program import InputError

# The words by which people and `datasets` name splits, and the name that `datasets` gives them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# Builders of `datasets` that images are read by; others follow links or run parsers that nothing here needs.
READERS = ("imagefolder", "parquet", "arrow", "webdataset", "json", "csv")
MAX_PARTS = 1024  # of a stream that has no files of its own
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
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
    """

    name: str
    split: str
    rows: datasets.Dataset | datasets.IterableDataset
    class_names: list[str] | None
    num_rows: int | None
    read: Callable[[dict[str, Any]], bytes] = ImageFiles().read


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
        raise InputError(f"cannot read the data {src}: {str(cause).strip() or type(cause).__name__}") from error


def held_out_of(split: str | None) -> tuple[str, float, int] | None:
    """Return the split, fraction and seed of what `hold_out` has named, None for other splits."""
    held = re.fullmatch(r"(.+)/held-out-(\d+(?:\.\d+)?(?:e-\d+)?)-(\d+)", split or "")
    return (held[1], float(held[2]), int(held[3])) if held and 0 < float(held[2]) < 1 else None


def labels_of(source: Source) -> np.ndarray:
    """Return the label of each image of a map-style source, -1 where it has none."""
    labels = source.rows.data.column("label") if isinstance(source.rows, datasets.Dataset) else None
    assert labels is not None
    if source.rows._indices is not None:  # some of the rows
        labels = labels.take(source.rows._indices.column(0).combine_chunks())
    return labels.fill_null(-1).to_numpy()


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
        InputError: A class has too few images to be on both sides.
    """
    fraction = float(f"{fraction:g}")  # as the split's name says it
    labels = labels_of(source)
    held = []
    for label in np.unique(labels):
        members = np.random.default_rng([seed, int(label) + 1]).permutation(np.flatnonzero(labels == label))
        number = max(1, round(fraction * len(members)))
        if number >= len(members):
            name = source.class_names[label] if source.class_names and label >= 0 else label
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
    """

    rows: Any
    num_rows: int | None
    read: Callable[[dict[str, Any]], bytes]


def _find(src: str) -> tuple[list[str], Callable[[str, bool], Rows]]:
    """Return the splits of `src`, and what loads one of them."""
    path = Path(src)
    if not src:
        raise InputError("the data's name is empty; name a folder, a file or a Hub dataset id ORG/NAME")
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _find_saved(path)
        if folders := _class_folders(path):
            return list(folders), lambda split, streaming: _load_class_folders(folders[split], streaming)
        for name in ("README.md", ".huggingface.yaml"):
            _check_configs(path / name)
        builder = datasets.load_dataset_builder(str(path))
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
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", src) and path.suffix not in FILE_FORMATS:
        with contextlib.suppress(HTTPError, HFValidationError, OSError):  # `datasets` reports those itself
            _check_configs(Path(hf_hub_download(src, "README.md", repo_type="dataset")))
        builder = datasets.load_dataset_builder(src)
    else:
        raise InputError(f"there is no data {src}: no such folder or file, and no Hub dataset id ORG/NAME")

    if builder.name not in READERS:
        raise InputError(f"{src} has files that `datasets` reads as {builder.name}; there are {', '.join(READERS)}")
    data_files = builder.config.data_files

    def load(split: str, streaming: bool) -> Rows:
        for file in data_files[split]:
            _check_whole(Path(file))
        # Only this split's files are named, or `datasets` would fetch and convert all splits. It
        # takes names for patterns.
        files = {split: [glob.escape(file) for file in data_files[split]]}
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


def _check_configs(card: Path) -> None:
    """Refuse a card whose `configs` name data files outside of the dataset, or a protocol to open them by.

    Raises:
        InputError: It does.
    """
    if not card.is_file():
        return
    text = read_text(card)
    blocks = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        content = yaml.safe_load(text if card.suffix == ".yaml" else blocks[1] if blocks else "")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"cannot read {card}: its metadata is not YAML: {' '.join(str(error).split())}") from error
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


def _check_whole(path: Path) -> None:
    """Refuse a tar file that was cut off or damaged, which its readers take for a shorter one."""
    if path.suffix != ".tar" or not path.is_file():
        return
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:  # reads the headers only
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except tarfile.TarError as error:
        raise InputError(f"{path} is no whole tar file ({error}); fetch it again") from error
    with path.open("rb") as file:
        file.seek(end)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise InputError(f"{path} was cut off or damaged at byte {end}; fetch it again")


def _find_saved(path: Path) -> tuple[list[str], Callable[[str, bool], Rows]]:
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
    """
    folders = _folders(path)
    files = [p for p in path.iterdir() if p.is_file()]
    # Where something else than the folders' names says what is what, `datasets` shall read that.
    configured = any(file.name == "README.md" and "\nconfigs:" in file.read_text(errors="replace") for file in files)
    described = any(any(folder.glob("metadata.*")) for folder in (path, *folders))
    if configured or described or any(file.suffix in FILE_FORMATS for file in files):
        return None
    if not any(_has_image(folder) for folder in folders):
        return None
    splits = {SPLITS[f.name.lower()]: f for f in folders if f.name.lower() in SPLITS and _folders(f)}
    return splits or {_split_in(path.name) or "train": path}


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _has_image(path: Path) -> bool:
    return any(f.lower().endswith(IMG_EXTENSIONS) for _, _, fs in os.walk(path, followlinks=True) for f in fs)


def _load_class_folders(path: Path, streaming: bool) -> Rows:
    names = [folder.name for folder in _folders(path)]
    files = make_dataset(path, {name: i for i, name in enumerate(names)}, IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise InputError(f"{path} has no image in its class folders")
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    images = [{"bytes": None, "path": file} for file, _ in files]
    rows = datasets.Dataset.from_dict({"image": images, "label": [label for _, label in files]}, features=features)
    number = len(rows)
    return Rows(rows.to_iterable_dataset(num_shards=min(number, MAX_PARTS)) if streaming else rows, number, read_named)


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
    rows, num_rows, read = loaded
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
    if label is not None and not isinstance(label, datasets.ClassLabel) and "int" not in getattr(label, "dtype", ""):
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
