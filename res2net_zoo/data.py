"""From a source of images to batches: reading through `datasets`, labels, timm's transform."""

import glob
import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from res2net_zoo.program import InputError

# The words by which people and `datasets` name splits, and the name that `datasets` gives them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
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
    """

    name: str
    split: str
    rows: datasets.Dataset | datasets.IterableDataset
    class_names: list[str] | None
    num_rows: int | None


def open_source(
    src: str, split: str | None = None, *, streaming: bool = False, label_column: str | None = None
) -> Source:
    """Open one split of labelled images.

    Args:
        src: A Hub dataset id, a folder (of class folders, of splits of class folders, of Parquet,
            Arrow or WebDataset files, or made by `save_to_disk`), such a file, or a pattern of
            such files.
        split: Which split; default the validation split, else the test split, else the only one.
        streaming: Whether to read the images in order as they come, converting nothing into the
            local cache first.
        label_column: Name of the column with the labels, where it is not plain.

    Returns:
        The split. Its images are not decoded yet: bytes or paths.

    Raises:
        InputError: No such data, split or column, or it cannot be read.
    """
    try:
        splits, load = _find(src)
        split = _choose_split(src, splits, split)
        rows = load(split, streaming)
    except InputError:
        raise
    except Exception as error:
        # `datasets` wraps whatever its readers raise (tarfile, pyarrow, the network, the operating
        # system) in types of its own; all that a user can do is in the innermost message.
        cause = error.__cause__ or error
        raise InputError(f"cannot read the data {src}: {str(cause).strip() or type(cause).__name__}") from error
    return _describe(src, split, rows, label_column)


def _find(src: str) -> tuple[list[str], Callable[[str, bool], Any]]:
    """Return the splits of `src`, and what loads one of them."""
    path = Path(src)
    options: dict[str, Any] = {}
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _find_saved(path)
        folders = _class_folders(path)
        if folders:
            builder = _builder("imagefolder", data_files=folders)
            options = {"drop_labels": False}  # else a single class would have no label
        else:
            builder = _builder(str(path))
    elif matches := sorted(glob.glob(src)):
        kinds = {FILE_FORMATS.get(Path(match).suffix) for match in matches}
        kind = kinds.pop()
        if kinds or kind is None:
            raise InputError(f"{src} is no {', no '.join(FILE_FORMATS)} file; name one kind of those, or a folder")
        builder = _builder(kind, data_files={_split_in(path.name) or "train": matches})
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", src) and not path.suffix:
        builder = _builder(src)
    else:
        raise InputError(f"there is no data {src}: no such folder or file, and no Hub dataset id ORG/NAME")

    data_files = builder.config.data_files

    def load(split: str, streaming: bool) -> Any:
        for file in data_files[split]:
            _check_whole(Path(file))
        # Only this split's files are named, or `datasets` would fetch and convert all splits.
        return datasets.load_dataset(
            builder.name,
            data_files={split: list(data_files[split])},
            split=split,
            features=builder.info.features,
            streaming=streaming,
            **options,
        )

    return list(data_files), load


def _builder(path: str, **kwargs: Any) -> datasets.DatasetBuilder:
    return datasets.load_dataset_builder(path, **kwargs)


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


def _find_saved(path: Path) -> tuple[list[str], Callable[[str, bool], Any]]:
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        saved = datasets.DatasetDict({_split_in(path.name) or "train": saved})
    return list(saved), lambda split, streaming: saved[split].to_iterable_dataset() if streaming else saved[split]


def _class_folders(path: Path) -> dict[str, list[str]] | None:
    """Return the files of each split if `path` holds class folders, or splits of class folders.

    `datasets` finds splits by words anywhere in a path, and would take a class called `test tube`
    for a test split; so the files are named to it one split at a time.
    """
    folders = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    files = [p for p in path.iterdir() if p.is_file()]
    if not folders or any(file.suffix in FILE_FORMATS or file.name == "README.md" for file in files):
        return None
    if all(_holds_only(folder, FILE_FORMATS) for folder in folders):
        return None
    splits = {
        SPLITS[f.name.lower()]: f for f in folders if f.name.lower() in SPLITS and any(p.is_dir() for p in f.iterdir())
    }
    if splits:
        return {split: [str(folder / "*" / "**")] for split, folder in splits.items()}
    return {_split_in(path.name) or "train": [str(path / "*" / "**")]}


def _holds_only(folder: Path, suffixes: Any) -> bool:
    return all(file.suffix in suffixes for file in folder.iterdir())


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


def _describe(src: str, split: str, rows: Any, label_column: str | None) -> Source:
    features = rows.features
    if features is None:
        raise InputError(f"{src} does not say what its columns are; read it without --streaming")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images += [name for name in IMAGE_COLUMNS if name in features]
    if not images:
        raise InputError(f"{src} has no column of images; its columns are {', '.join(features)}")
    if label_column is not None and label_column not in features:
        raise InputError(f"{src} has no column {label_column}; its columns are {', '.join(features)}")
    labels = [label_column] if label_column else [name for name in LABEL_COLUMNS if name in features]
    labels += [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels:
        raise InputError(f"{src} has no column of labels; name one with --label-column: {', '.join(features)}")
    label = features[labels[0]]
    if not (isinstance(label, datasets.ClassLabel) or (isinstance(label, datasets.Value) and "int" in label.dtype)):
        raise InputError(f"column {labels[0]} of {src} holds no class numbers; name another with --label-column")
    # Decoding is ours: `datasets` would turn images by their EXIF orientation, which timm does not,
    # and one corrupt image would end a whole stream. First of all, for a stream decodes its rows
    # as soon as they are mapped to others, as renaming does.
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    rows = rows.select_columns([images[0], labels[0]])
    rows = rows.rename_columns({a: b for a, b in ((images[0], "image"), (labels[0], "label")) if a != b})
    return Source(
        name=src if not Path(src).exists() and not glob.has_magic(src) else Path(src).resolve().name,
        split=split,
        rows=rows,
        class_names=list(label.names) if isinstance(label, datasets.ClassLabel) else None,
        num_rows=len(rows) if isinstance(rows, datasets.Dataset) else None,
    )


def decode(image: dict[str, Any], mode: str) -> Image.Image:
    """Decode an image as timm's datasets do: no EXIF orientation, then one conversion of mode.

    Args:
        image: `bytes`, or where they are None `path`.
        mode: PIL mode, `RGB` or `L`.

    Returns:
        The decoded image.

    Raises:
        Exception: Whatever PIL or the operating system raise for a corrupt or missing image.
    """
    content = image["bytes"]
    with Image.open(io.BytesIO(content) if content is not None else image["path"]) as opened:
        return opened.convert(mode)


@dataclass
class Sample:
    """One image ready for a model, or what is wrong with it.

    Attributes:
        place: Where it is in the data, for a message.
        image: (C, H, W), or None where something is wrong.
        target: What `Samples` was told to make of its label and path.
        corrupt: Why the image could not be decoded.
        fatal: What else is wrong, with which no figure can be right: its label, or the data's file.
    """

    place: str
    image: torch.Tensor | None = None
    target: Any = None
    corrupt: str | None = None
    fatal: str | None = None


class Samples:
    """Decodes and transforms rows. Errors are returned, for a loader's worker would garble them.

    Args:
        transform: From a PIL image to a (C, H, W) tensor.
        mode: PIL mode to convert the image to before.
        target: From a row's label and path to the sample's target; an `InputError` that it raises
            becomes the sample's `fatal`.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], torch.Tensor],
        mode: str,
        target: Callable[[int | None, str | None], Any],
    ) -> None:
        self.transform = transform
        self.mode = mode
        self.target = target

    def __call__(self, place: str, row: dict[str, Any]) -> Sample:
        """Make one sample of a row."""
        image = row["image"] or {"bytes": b"", "path": None}
        path = image["path"]
        sample = Sample(f"{place} ({path})" if path else place)
        try:
            sample.target = self.target(row["label"], path)
        except InputError as error:
            sample.fatal = str(error)
            return sample
        try:
            sample.image = self.transform(decode(image, self.mode))
        except Exception as error:
            # A damaged file makes PIL raise nearly anything: OSError, SyntaxError, struct.error, ...
            sample.corrupt = str(error) or type(error).__name__
        return sample


class MapSamples(torch.utils.data.Dataset):
    """Samples of a map-style dataset, or of those of its rows that `indices` names."""

    def __init__(self, rows: datasets.Dataset, samples: Samples, indices: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.samples = samples
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        index = self.indices[i]
        return self.samples(f"image {index}", self.rows[index])


class StreamSamples(torch.utils.data.IterableDataset):
    """Samples of an iterable dataset, in order; `datasets` shares its files among the workers."""

    def __init__(self, rows: datasets.IterableDataset, samples: Samples) -> None:
        self.rows = rows
        self.samples = samples

    def __iter__(self) -> Iterator[Sample]:
        i = 0
        try:
            for i, row in enumerate(self.rows, start=1):
                yield self.samples(f"image {i} of a stream", row)
        except Exception as error:
            # A file that ends too early or is none of its kind; `datasets` has no one type for it.
            yield Sample(f"the stream after {i} images", fatal=f"cannot read on: {str(error) or type(error).__name__}")
