"""Batches of training images, in an order that a run can resume anywhere.

The order of an epoch's images follows from (seed, epoch), and the augmentation of each from (seed, epoch, place in the
order). So a run that is resumed within an epoch sees what it would have seen without the interruption, and P processes
with batches of B images see together what one process with batches of P * B sees.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node
from timm.utils import random_seed
from torch.utils.data import DataLoader, IterableDataset, Sampler

from res2net_zoo.data.images import Sample, Samples
from res2net_zoo.data.sources import labels_of
from res2net_zoo.evaluation import collate
from res2net_zoo.training.data import TrainingData
from res2net_zoo.training.loss import balanced
from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.shutdown import spare_worker


def seed_of(*parts: int) -> int:
    """Return a 32-bit seed that depends on every part; seeds of different parts are independent in practice."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Order(Sampler[list[tuple[int, int, int]]]):
    """The batches of one process in an epoch, as (epoch, place, index) of each image.

    Args:
        indices: Images to choose from.
        batch_size: Images a batch, in this process.
        rank: Index of this process.
        world: Number of processes.
        seed: Decides the order, with the epoch.
        weights: Probability of each image, to draw with replacement; None to show each image once.
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
        """Set the epoch of the next iteration, and its first batch."""
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
    """Training samples of a map-style dataset, by the keys of `Order`."""

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
    """Endless training samples of one process's share of a stream, shuffled again in each pass.

    A pass over the share is not an epoch: shares differ in length, but an epoch has the same length in
    every process. Images of batches before the first that is needed are not decoded.

    Args:
        rows: The process's share.
        samples: Makes samples of rows.
        seed: Decides order and augmentation, with the epoch.
        batch_size: Images a batch.
        buffer: Images to shuffle among; files are shuffled as well.
        name: Name of these rows in a message.
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
        """Set the epoch of the next iteration, and the first batch that is needed."""
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
                # `datasets` has no single type of error for truncated and for foreign files.
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
    """Return the loader of this process's shuffled batches, which `batches` iterates over.

    Args:
        data: The images.
        samples: Makes samples of its rows.
        accelerator: The processes.
        batch_size: Images a batch, in this process.
        workers: Loader processes; of a stream, no more are started than there are files.
        seed: Decides the order.
        batches: Batches an epoch.
        balance: Whether to draw all classes with the same probability, with replacement.
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
        skip_corrupt: Whether to skip images that cannot be decoded.
        left_out: Set to add their indices to, or, of a stream, their places.

    Yields:
        Images (N, C, H, W) and classes (N,).

    Raises:
        InputError: An image cannot be decoded and is not to be skipped, or a whole batch cannot.
    """
    source: Any = loader.batch_sampler if isinstance(loader.batch_sampler, Order) else loader.dataset
    source.start(epoch, first)
    loaded = iter(loader)
    if source is loader.dataset:
        for _ in range(first):  # a stream is read from its start
            next(loaded)
    while True:
        try:
            images, targets, bad = next(loaded)
        except StopIteration:
            return
        for sample in bad:
            if sample.fatal is not None:
                raise InputError(f"{sample.place}: {sample.fatal}")
            if not skip_corrupt:
                hint = "remove it, or skip corrupt images"
                raise InputError(f"{sample.place}: corrupt ({sample.corrupt}); {hint}", "skip_corrupt")
            if left_out is not None:
                left_out.add(sample.place if sample.index is None else sample.index)
        if images is None:
            raise InputError(f"a whole batch cannot be decoded, such as {bad[0].place}")
        yield images, targets[:, 0]
