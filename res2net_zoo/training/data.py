"""Images for training: a held-out split, checks before anything starts, and an order that can be taken up again.

What an epoch shows is a function of the seed, the epoch and the place in it: the order of the images
by (seed, epoch), each image's augmentation by (seed, epoch, place). So a run that goes on from the
middle of an epoch sees what it would have seen, and P processes with batches of B see together what
one process with batches of P * B sees.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets.distributed import split_dataset_by_node
from timm.utils import random_seed
from torch.utils.data import DataLoader, IterableDataset, Sampler

from res2net_zoo.data.images import ForeignPathError, Sample, Samples, check_mode, open_image
from res2net_zoo.data.sources import Source, held_out_of, hold_out, labels_of, open_source
from res2net_zoo.evaluation import collate
from res2net_zoo.training.loss import balanced
from res2net_zoo.utils.console import progress_bar, warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.processes import all_or_none, main_first
from res2net_zoo.utils.shutdown import spare_worker


def seed_of(*parts: int) -> int:
    """Return a seed of 32 bits that depends on every part, as good as independent for different parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass
class TrainingData:
    """What is trained and evaluated on.

    Attributes:
        train: Training images.
        valid: Images to evaluate on.
        names: The classes.
        counts: Training images of each class; None for a stream.
        indices: Training images to use, those that can be decoded; None for a stream.
        unreadable: Images among them that turned out not to be decodable, and were left out.
    """

    train: Source
    valid: Source
    names: list[str]
    counts: list[int] | None = None
    indices: np.ndarray | None = None
    unreadable: list[int] = field(default_factory=list)

    def leave_out(self, indices: Sequence[int]) -> None:
        """Have some training images not be used.

        Raises:
            InputError: They are all there is of a class.
        """
        if self.indices is not None:
            self.indices = np.setdiff1d(self.indices, indices)
            self.counts = _count(labels_of(self.train)[self.indices], self.train, self.names)

    @property
    def num_images(self) -> int | None:
        """Number of training images, where it is known."""
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
    """Open training images and those to evaluate on, and find out whether their labels make sense.

    Args:
        src: As for `open_source`.
        accelerator: The processes.
        train_split: Split to train on.
        eval_split: Split to evaluate on; default validation, else test, else held out of training.
            What it names of the training split, as `hold_out` does, is not trained on.
        fraction: Share of each class to hold out.
        seed: Chooses what is held out.
        streaming: Whether to read the images as they come.
        label_column: Column of the labels, where it is not plain.
        num_classes: Number of classes, where a stream does not say.

    Returns:
        Both.

    Raises:
        InputError: There is no such data, or it cannot be trained on: too few classes, an empty one,
            one that only evaluation has, wrong labels.
    """

    def open_split(split: str | None) -> Source:
        return open_source(src, split, streaming=streaming, label_column=label_column)

    def open_splits() -> tuple[Source, Source]:
        train = open_split(train_split)
        if eval_split is not None:
            valid = open_split(eval_split)
            held = held_out_of(valid.split)
            if held and held[0] == train.split:
                return hold_out(train, *held[1:])
            if whole(valid) == whole(train):
                raise InputError(
                    f"training and evaluation would both be on {whole(train)} of {src}; "
                    "name another split with --train-split or --eval-split"
                )
            return train, valid
        with contextlib.suppress(InputError):  # there are several splits, but no validation or test
            valid = open_split(None)
            if whole(valid) != whole(train):
                return train, valid
        if streaming:
            raise InputError(f"{src} has no split to evaluate on, and nothing can be held out of a stream")
        return hold_out(train, fraction, seed)

    def whole(source: Source) -> str:
        """Return the split that a source is all or part of."""
        return source.split.split("/held-out-")[0]

    train, valid = main_first(accelerator, open_splits)
    if accelerator.is_main_process:
        for skipped in filter(None, {train.skipped: None, valid.skipped: None}):
            warn(f"left out of {src}: {skipped}")
    names = class_names(train, num_classes)
    check_names(train, valid, names)
    if streaming:
        return TrainingData(train, valid, names)
    return TrainingData(train, valid, names, count_classes(train, valid, names), np.arange(len(train.rows)))


def class_names(train: Source, num_classes: int | None = None) -> list[str]:
    """Return a name for each class: the data's, or numbers.

    Args:
        train: The training images.
        num_classes: How many there are, where the data does not say.

    Raises:
        InputError: The data does not say, and is not there to be counted; or there is only one.
    """
    names = train.class_names
    if names is not None and num_classes not in (None, len(names)):
        raise InputError(f"{train.name} has {len(names)} classes and not {num_classes}; leave --num-classes out")
    if names is None:
        if num_classes is None:
            if not isinstance(train.rows, datasets.Dataset):
                raise InputError(f"{train.name} does not say how many classes it has; --num-classes does")
            num_classes = int(labels_of(train).max(initial=-1)) + 1
        names = [str(i) for i in range(num_classes)]
    if len(names) < 2:
        raise InputError(f"{train.name} has a single class in {train.split}; it takes two or more to tell apart")
    return list(names)


def check_names(train: Source, valid: Source, names: Sequence[str]) -> None:
    """Refuse classes to evaluate on that are not among those to train on."""
    if strange := sorted(set(valid.class_names or ()) - set(names)):
        raise InputError(
            f"{valid.name} has classes in {valid.split} that {train.split} has not: {', '.join(strange[:5])}"
        )


def count_classes(train: Source, valid: Source, names: Sequence[str]) -> list[int]:
    """Count the training images of each class, once the labels are found to make sense.

    Args:
        train: Map-style training images.
        valid: Images to evaluate on.
        names: The classes.

    Returns:
        The number of images of each class.

    Raises:
        InputError: An image has no label or a wrong one, or a class has no image.
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
        raise InputError(f"{source.name} has no image of {few} in {source.split}; add some, or take the class out")
    return counts.tolist()


class _Decodable(torch.utils.data.Dataset):
    """Tells of each image why it cannot be decoded, or None."""

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
                opened.draft("RGB", (1, 1))  # a JPEG's blocks are all read, but turned into few pixels
                opened.load()
        except ForeignPathError:
            raise  # the image is not damaged, so it must not be skipped
        except Exception as error:  # PIL raises nearly anything
            reason = (
                "not an image of a supported format"
                if "UnidentifiedImageError" in type(error).__name__
                else str(error) or repr(error)
            )
            return index, f"{image['path'] or f'image {index}'} ({reason})"
        return None


def _problems(found: list[tuple[int, str] | None]) -> list[tuple[int, str]]:
    return [problem for problem in found if problem is not None]


def find_corrupt(source: Source, accelerator: Accelerator, workers: int) -> dict[int, str]:
    """Decode every image once, each process its share.

    Args:
        source: Map-style images.
        accelerator: The processes.
        workers: Loader processes, for each process.

    Returns:
        Which images cannot be decoded, by index, and why; the same in every process.
    """
    share = range(accelerator.process_index, len(source.rows), accelerator.num_processes)
    loader = DataLoader(_Decodable(source, share), batch_size=32, num_workers=workers, collate_fn=_problems)
    bar = progress_bar(accelerator, loader, desc=f"check the images of {source.split}")
    found = all_or_none(lambda: [problem for batch in bar for problem in batch])
    return dict(sorted(gather_object(found)))


def check_readable(source: Source) -> None:
    """Find out whether there is an image that can be decoded, by reading up to the first one.

    Raises:
        InputError: There is none.
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
        workers: Loader processes, for each process.
        skip: Whether some may be left out.

    Returns:
        Training images to leave out, by index.

    Raises:
        InputError: Some cannot be decoded, and are not to be skipped.
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
                "take them out, or leave them out with --skip-corrupt"
            )
        if found and accelerator.is_main_process:
            warn(f"{len(found)} images of {source.split} cannot be decoded and are left out")
    return list(found)


class Order(Sampler[list[tuple[int, int, int]]]):
    """The batches of one process in an epoch, as (epoch, place, index) of each image.

    Args:
        indices: Images to choose from.
        batch_size: Images a batch, in this process.
        rank: Which process this is.
        world: Number of processes.
        seed: Decides the order, with the epoch.
        weights: Chance of each image to be drawn, for drawing with replacement; None to show each once.
        repeats: How many times in succession each image is shown, differently augmented, an epoch
            then showing that many times fewer different ones (repeated augmentation: Hoffer et al.,
            2020, arXiv 1901.09335).
        batches: Batches an epoch.
    """

    def __init__(
        self,
        indices: Sequence[int] | np.ndarray,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        weights: torch.Tensor | None,
        repeats: int,
        batches: int,
    ) -> None:
        self.indices = torch.as_tensor(np.asarray(indices))
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.seed = seed
        self.weights = weights
        self.repeats = repeats
        self.batches = batches
        self.epoch = 0
        self.first = 0

    def start(self, epoch: int, batch: int = 0) -> None:
        """Say which epoch the next iteration is, and from which batch on."""
        self.epoch = epoch
        self.first = batch

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, 0, self.epoch))
        number = len(self.indices)
        if self.weights is None:
            order = torch.randperm(number, generator=generator)
        else:
            order = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        order = self.indices[order.repeat_interleave(self.repeats)[:number]]
        for batch in range(self.first, self.batches):
            start = (batch * self.world + self.rank) * self.batch_size
            images = order[start : start + self.batch_size].tolist()
            yield [(self.epoch, start + i, index) for i, index in enumerate(images)]


class Augmented(torch.utils.data.Dataset):
    """Training samples of a map-style dataset, by the keys that `Order` gives."""

    def __init__(self, rows: datasets.Dataset, samples: Samples, seed: int) -> None:
        self.rows = rows
        self.samples = samples
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        epoch, place, index = key
        random_seed(seed_of(self.seed, 1, epoch, place))
        sample = self.samples(f"image {index}", self.rows[index])
        sample.index = index
        return sample


class AugmentedStream(IterableDataset):
    """Endless training samples of one process's share of a stream, shuffled anew in each pass.

    A pass over the share is no epoch: shares differ in length, and an epoch is as long in every
    process. Of batches that are to be left out, nothing is decoded and no image comes.

    Args:
        rows: The process's share.
        samples: Makes samples of rows.
        seed: Decides order and augmentation, with the epoch.
        batch_size: Images a batch.
        buffer: Images to shuffle among; files are shuffled as well.
        name: What to call these rows in a message.
    """

    def __init__(
        self, rows: datasets.IterableDataset, samples: Samples, seed: int, batch_size: int, buffer: int, name: str
    ) -> None:
        self.rows = rows
        self.samples = samples
        self.seed = seed
        self.batch_size = batch_size
        self.buffer = buffer
        self.name = name
        self.start(0)

    def start(self, epoch: int, batch: int = 0) -> None:
        """Say which epoch the next iteration is, and which batch is the first that is needed."""
        self.epoch = epoch
        self.first = batch

    def __iter__(self) -> Iterator[Sample]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        done = passes = 0
        while True:
            # The same in all workers, which share the files; their epoch would be one that all of them set.
            rows = self.rows.shuffle(seed_of(self.seed, 4, self.epoch, passes), buffer_size=self.buffer)
            before = done
            try:
                for row in rows:
                    # The loader takes its batches from the workers in turn.
                    if done // self.batch_size * workers + worker < self.first:
                        yield Sample("left out")
                    else:
                        random_seed(seed_of(self.seed, 2, self.epoch, worker, done))
                        yield self.samples(f"image {done} of {self.name}", row)
                    done += 1
            except Exception as error:
                # `datasets` has no one type for a file that ends too early or is none of its kind.
                yield Sample(
                    self.name, fatal=f"cannot read on after {done} images: {str(error) or type(error).__name__}"
                )
            if done == before:
                yield Sample(self.name, fatal="has no images")
            passes += 1


def share_of_stream(
    rows: datasets.IterableDataset, rank: int, world: int, workers: int
) -> tuple[datasets.IterableDataset, bool]:
    """Return one process's share of a stream, and whether it reads that share only.

    Whole files, or where they are Parquet row groups, go to processes; with fewer of them than
    processes each process reads everything and takes every world-th image.
    """
    if rows.num_shards < world * max(1, workers):
        rows = rows.reshard()
    if rows.num_shards >= world:
        return rows.shard(world, rank, contiguous=False), True
    return split_dataset_by_node(rows, rank, world), False


def steps_of(data: TrainingData, step_images: int, wanted: int | None) -> int:
    """Return the optimizer steps of an epoch.

    Args:
        data: What is trained on.
        step_images: Images a step, over all processes.
        wanted: Steps that an epoch shall have; None for all images once.

    Raises:
        InputError: There are fewer images, or nobody knows how many.
    """
    images = data.num_images
    if images is None:
        if wanted is None:
            raise InputError(f"{data.train.name} does not say how many images it has; --steps-per-epoch makes epochs")
        return wanted
    # A stream comes around again; of other data an epoch has no image twice.
    if images < step_images * (wanted if wanted and data.indices is not None else 1):
        batch = f"{wanted} steps of {step_images}" if wanted else f"a batch of {step_images}"
        raise InputError(f"{data.train.name} has {images} images to train on, less than {batch}")
    return wanted or images // step_images


def training_loader(
    data: TrainingData,
    samples: Samples,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
    seed: int,
    *,
    batches: int,
    balance: bool = False,
    repeats: int = 1,
    buffer: int = 1000,
) -> DataLoader:
    """Make the loader of this process's batches, shuffled; `batches` goes through it.

    Args:
        data: What to train on.
        samples: Makes samples of its rows.
        accelerator: Tells which process this is.
        batch_size: Images a batch, in this process.
        workers: Loader processes; of a stream, no more are started than there are files.
        seed: Decides the order.
        batches: Batches an epoch.
        balance: Whether to draw from all classes alike, with replacement.
        repeats: As for `Order`.
        buffer: Images of a stream to shuffle among; files are shuffled as well.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    pin_memory = accelerator.device.type == "cuda"
    if data.indices is None:
        rows, alone = share_of_stream(data.train.rows, rank, world, workers)
        if not alone and accelerator.is_main_process:
            warn(f"{data.train.name} has fewer files than there are processes; each reads all")
        name = "the stream" if world == 1 else f"process {rank}'s share of the stream"
        return DataLoader(
            AugmentedStream(rows, samples, seed_of(seed, rank), batch_size, buffer, name),
            batch_size=batch_size,
            num_workers=min(workers, rows.num_shards),
            collate_fn=collate,
            worker_init_fn=spare_worker,
            pin_memory=pin_memory,
        )
    weights = None
    if balance and data.counts is not None:
        weights = balanced(data.counts)[torch.from_numpy(labels_of(data.train)[data.indices])]
    return DataLoader(
        Augmented(data.train.rows, samples, seed),
        batch_sampler=Order(data.indices, batch_size, rank, world, seed, weights, repeats, batches),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        worker_init_fn=spare_worker,
        pin_memory=pin_memory,
    )


def batches(
    loader: DataLoader, epoch: int, first: int = 0, skip_corrupt: bool = False, left_out: set[int | str] | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches of an epoch.

    Args:
        loader: From `training_loader`.
        epoch: Which epoch, from 0.
        first: Batch to begin with.
        skip_corrupt: Whether to leave out images that cannot be decoded.
        left_out: Takes their indices, or of a stream their places.

    Yields:
        Images (N, C, H, W) and classes (N,).

    Raises:
        InputError: An image cannot be used.
    """
    source: Any = loader.batch_sampler if isinstance(loader.batch_sampler, Order) else loader.dataset
    source.start(epoch, first)
    loaded = iter(loader)
    if source is loader.dataset:
        for _ in range(first):  # a stream comes from its start, what was seen before empty
            next(loaded)
    while True:
        try:
            images, targets, bad = next(loaded)
        except StopIteration:
            return
        for sample in bad:
            if sample.fatal is not None or not skip_corrupt:
                hint = f"corrupt ({sample.corrupt}); take it out, or leave it out with --skip-corrupt"
                raise InputError(f"{sample.place}: {sample.fatal or hint}")
            if left_out is not None:
                left_out.add(sample.place if sample.index is None else sample.index)
        if images is None:
            raise InputError(f"a whole batch cannot be decoded, such as {bad[0].place}")
        yield images, targets[:, 0]
