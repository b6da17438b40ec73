"""Training and evaluation splits, and checks of both before training starts."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from res2net_zoo.data.images import ForeignPathError, check_mode, open_image, reason_of
from res2net_zoo.data.sources import Source, held_out_of, hold_out, labels_of, open_source
from res2net_zoo.utils.console import progress_bar, warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.processes import all_or_none, check_same, main_first


@dataclass
class TrainingData:
    """The training and evaluation images.

    Attributes:
        train: Training images.
        valid: Evaluation images.
        names: Names of the classes.
        counts: Number of training images of each class; None for a stream.
        indices: Indices of the training images to use; None for a stream.
        unreadable: Those of `indices` that could not be decoded during training and were skipped.
    """

    train: Source
    valid: Source
    names: list[str]
    counts: list[int] | None = None
    indices: np.ndarray | None = None
    unreadable: list[int] = field(default_factory=list)

    def leave_out(self, indices: Sequence[int]) -> None:
        """Exclude training images.

        Raises:
            InputError: No images of a class remain.
        """
        if self.indices is not None:
            self.indices = np.setdiff1d(self.indices, indices)
            self.counts = _count(labels_of(self.train)[self.indices], self.train, self.names)

    @property
    def num_images(self) -> int | None:
        """Number of training images; None if unknown."""
        return self.train.num_rows if self.indices is None else len(self.indices) - len(self.unreadable)

    @property
    def used_counts(self) -> list[int] | None:
        """Training images of each class that can be decoded; None for a stream."""
        if self.indices is None:
            return None
        used = np.setdiff1d(self.indices, self.unreadable)
        return np.bincount(labels_of(self.train)[used], minlength=len(self.names)).tolist()


def open_training_data(
    src: str,
    accelerator: Accelerator,
    train_split: str = "train",
    eval_split: str | None = None,
    *,
    fraction: float = 0.2,
    seed: int = 0,
    streaming: bool = False,
    label_column: str | None = None,
    num_classes: int | None = None,
) -> TrainingData:
    """Open the training and evaluation images, and check their labels.

    Args:
        src: As for `open_source`.
        accelerator: The processes.
        train_split: Split to train on.
        eval_split: Split to evaluate on; by default validation, else test, else held out of the training split.
            A held-out part of the training split, named as by `hold_out`, is excluded from training.
        fraction: Share of each class to hold out.
        seed: Random seed for holding out.
        streaming: Whether to read the images as a stream.
        label_column: Label column, if ambiguous.
        num_classes: Number of classes, if the data does not define it.

    Returns:
        The images.

    Raises:
        InputError: The data is missing or unsuitable: too few classes, an empty class, a class that is missing in the
            training split, or wrong labels.
    """
    train, valid = main_first(
        accelerator, lambda: open_splits(src, train_split, eval_split, fraction, seed, streaming, label_column)
    )
    for skipped in filter(None, {train.skipped: None, valid.skipped: None}):
        warn(f"skipped in {src}: {skipped}")
    splits = {"training": train, "evaluation": valid}
    numbers = {f"the number of {use} images": source.num_rows for use, source in splits.items()}
    check_same(numbers, "give all machines the same data", "data")
    names = class_names(train, num_classes)
    check_names(train, valid, names)
    if streaming:
        return TrainingData(train, valid, names)
    return TrainingData(train, valid, names, count_classes(train, valid, names), np.arange(len(train.rows)))


def open_splits(
    src: str,
    train_split: str,
    eval_split: str | None,
    fraction: float,
    seed: int,
    streaming: bool,
    label_column: str | None,
) -> tuple[Source, Source]:
    """Open the training and the evaluation split. The arguments are those of `open_training_data`.

    Returns:
        Both splits, which have no image in common.

    Raises:
        InputError: A split is missing, both are the same, or nothing can be held out.
    """
    open_split = partial(open_source, src, streaming=streaming, label_column=label_column)
    train = open_split(train_split)
    if eval_split is not None:
        valid = open_split(eval_split)
        held = held_out_of(valid.split)
        if held and held[0] == train.split:
            return hold_out(train, *held[1:])
        if whole_split(valid) == whole_split(train):
            raise InputError(
                f"training and evaluation would both be on {whole_split(train)} of {src}; "
                "name another split for one of them",
                *("train_split", "eval_split"),
            )
        return train, valid
    with contextlib.suppress(InputError):  # several splits, but no validation or test
        valid = open_split(None)
        if whole_split(valid) != whole_split(train):
            return train, valid
    if streaming:
        raise InputError(f"{src} has no evaluation split, and images of a stream cannot be held out")
    return hold_out(train, fraction, seed)


def whole_split(source: Source) -> str:
    """Return the name of a source's split, without a suffix for a held-out part."""
    return source.split.split("/held-out-")[0]


def class_names(train: Source, num_classes: int | None = None) -> list[str]:
    """Return the names of the classes, or numbers if the data has no names.

    Args:
        train: The training images.
        num_classes: Number of classes, if the data does not define it.

    Raises:
        InputError: The number of classes is unknown, or 1.
    """
    names = train.class_names
    if names is not None and num_classes not in (None, len(names)):
        raise InputError(f"{train.name} has {len(names)} classes, not {num_classes}; omit the number", "num_classes")
    if names is None:
        if num_classes is None:
            if not isinstance(train.rows, datasets.Dataset):
                raise InputError(f"{train.name} does not define the number of classes; specify it", "num_classes")
            num_classes = int(labels_of(train).max(initial=-1)) + 1
        names = [str(i) for i in range(num_classes)]
    if len(names) < 2:
        raise InputError(f"{train.name} has only one class in {train.split}; classification needs two or more")
    return list(names)


def check_names(train: Source, valid: Source, names: Sequence[str]) -> None:
    """Check that all classes of the evaluation split are in the training split."""
    if strange := sorted(set(valid.class_names or ()) - set(names)):
        raise InputError(
            f"{valid.name} has classes in {valid.split} that are missing in {train.split}: {', '.join(strange[:5])}"
        )


def count_classes(train: Source, valid: Source, names: Sequence[str]) -> list[int]:
    """Check all labels, and count the training images of each class.

    Args:
        train: Map-style training images.
        valid: Evaluation images.
        names: Names of the classes.

    Returns:
        The number of images of each class.

    Raises:
        InputError: A label is missing or wrong, or a class has no image.
    """
    for source in (train, valid):
        if isinstance(source.rows, datasets.Dataset):
            labels = labels_of(source)
            known = len(source.class_names or names)
            if len(wrong := np.flatnonzero((labels < 0) | (labels >= known))):
                what = "no label" if (label := labels[wrong[0]]) == -1 else f"label {label}"
                raise InputError(
                    f"image {wrong[0]} of {source.split} in {source.name} has {what}; labels go from 0 to {known - 1}"
                )
    return _count(labels_of(train), train, names)


def _count(labels: np.ndarray, source: Source, names: Sequence[str]) -> list[int]:
    counts = np.bincount(labels, minlength=len(names))
    if len(empty := np.flatnonzero(counts == 0)):
        few = ", ".join(names[i] for i in empty[:5])
        raise InputError(f"{source.name} has no image of {few} in {source.split}; add some, or remove the class")
    return counts.tolist()


class _Decodable(torch.utils.data.Dataset):
    """Decodes images; an item is the error of an image, or None."""

    def __init__(self, source: Source, indices: range) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, str] | None:
        index = self.indices[i]
        image = self.source.rows[index]["image"] or {"bytes": b"", "path": None}
        try:
            with open_image(self.source.read(image)) as opened:
                check_mode(opened)
                opened.draft("RGB", (1, 1))  # reads all blocks of a JPEG, but decodes few pixels
                opened.load()
        except ForeignPathError:
            raise  # the image is not damaged, so it must not be skipped
        except Exception as error:  # PIL raises various types
            return index, f"{image['path'] or f'image {index}'} ({reason_of(error)})"
        return None


def _problems(found: list[tuple[int, str] | None]) -> list[tuple[int, str]]:
    return [problem for problem in found if problem is not None]


def find_corrupt(source: Source, accelerator: Accelerator, workers: int) -> dict[int, str]:
    """Decode every image once, distributed over the processes.

    Args:
        source: Map-style images.
        accelerator: The processes.
        workers: Data-loading workers per process.

    Returns:
        The errors of images that cannot be decoded, by index; the same in every process.
    """
    share = range(accelerator.process_index, len(source.rows), accelerator.num_processes)
    loader = DataLoader(_Decodable(source, share), batch_size=32, num_workers=workers, collate_fn=_problems)
    bar = progress_bar(accelerator, loader, desc=f"check the images of {source.split}")
    found = all_or_none(lambda: [problem for batch in bar for problem in batch])
    return dict(sorted(gather_object(found)))


def check_readable(source: Source) -> None:
    """Check that at least one image can be decoded.

    Raises:
        InputError: No image can be decoded.
    """
    images = _Decodable(source, range(len(source.rows)))
    first = None
    for i in range(len(images)):
        problem = images[i]
        if problem is None:
            return
        first = first or problem[1]
    raise InputError(
        f"none of the {len(images)} images of {source.split} in {source.name} can be decoded, such as {first}"
    )


def corrupt_images(data: TrainingData, accelerator: Accelerator, workers: int, skip: bool) -> list[int]:
    """Decode every image of both splits once.

    Args:
        data: Map-style images.
        accelerator: The processes.
        workers: Data-loading workers per process.
        skip: Whether to skip images that cannot be decoded.

    Returns:
        Indices of training images to skip.

    Raises:
        InputError: Images cannot be decoded and `skip` is False, or no image can be decoded.
    """
    found: dict[int, str] = {}
    for source in (data.valid, data.train):
        found = find_corrupt(source, accelerator, workers)
        if len(found) == len(source.rows):
            raise InputError(
                f"none of the {len(found)} images of {source.split} in {source.name} can be decoded, such as {found[0]}"
            )
        if found and not skip:
            few = "; ".join(list(found.values())[:5]) + "; ..." * (len(found) > 5)
            raise InputError(
                f"{len(found)} image{'s' * (len(found) > 1)} of {source.split} cannot be decoded: {few}; "
                "remove them, or skip corrupt images",
                "skip_corrupt",
            )
        if found:
            warn(f"{len(found)} images of {source.split} cannot be decoded and are skipped")
    return list(found)


def steps_of(data: TrainingData, step_images: int, wanted: int | None) -> int:
    """Return the number of optimizer steps per epoch.

    Args:
        data: The images.
        step_images: Images per step, over all processes.
        wanted: Steps per epoch; None for all images once.

    Raises:
        InputError: There are too few images, or their number is unknown.
    """
    # Includes images found to be unreadable during training, so that a resumed run has the same number of steps.
    images = data.train.num_rows if data.indices is None else len(data.indices)
    if images is None:
        if wanted is None:
            raise InputError(
                f"{data.train.name} does not define the number of images; set the steps per epoch", "steps_per_epoch"
            )
        return wanted
    # A stream is repeated; other data has each image at most once per epoch.
    if images < step_images * (wanted if wanted and data.indices is not None else 1):
        batch = f"{wanted} steps of {step_images}" if wanted else f"a batch of {step_images}"
        raise InputError(f"{data.train.name} has {images} training images, fewer than {batch}")
    return wanted or images // step_images
