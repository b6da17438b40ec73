"""Batches of training images, in an order that can be resumed at any step.

The order of the images is a function of (seed, epoch), and the augmentation of an image a function of (seed, epoch,
position in the order). A run that is resumed within an epoch therefore gets the same batches as without interruption,
and P processes with batches of B images together get the same images as one process with batches of P * B.
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
from res2net_zoo.evaluation import collate, corrupt_places
from res2net_zoo.training.data import TrainingData
from res2net_zoo.training.loss import balanced
from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.shutdown import ignore_job_signals


def seed_of(*parts: int) -> int:
    """Return a 32-bit seed that depends on every part; seeds of different parts are independent in practice."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Order(Sampler[list[tuple[int, int, int]]]):
    """The batches of one process in an epoch, as (epoch, position, index) of each image.

    Args:
        indices: Images to choose from.
        batch_size: Images per batch of this process.
        rank: Index of this process.
        world: Number of processes.
        seed: Random seed of the order.
        weights: Probability of each image, for sampling with replacement; None to use each image once.
        repeats: Number of consecutive copies of each image, with different augmentations; the number of different
            images per epoch decreases by this factor (repeated augmentation: Hoffer et al., 2020, arXiv 1901.09335).
        batches: Batches per epoch.
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
    """Training samples of a map-style dataset, indexed by the keys of `Order`."""

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
    """Endless training samples of one process's share of a stream, reshuffled in each pass.

    A pass over the share is not an epoch: shares differ in length, but an epoch has the same length in
    every process. Images of skipped batches are not decoded.

    Args:
        rows: The process's share.
        samples: Converts rows to samples.
        seed: Random seed of order and augmentation.
        batch_size: Images per batch.
        buffer: Buffer size for shuffling, in images; files are shuffled as well.
        name: Name of the rows in messages.
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
        """Set the epoch of the next iteration, and its first batch."""
        self.epoch = epoch
        self.first = batch

    def __iter__(self) -> Iterator[Sample]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        done = passes = 0
        while True:
            # The order must be the same in all workers, which divide the files among them.
            rows = self.rows.shuffle(seed_of(self.seed, 4, self.epoch, passes), buffer_size=self.buffer)
            before = done
            try:
                for row in rows:
                    # The data loader takes batches from its workers in turn.
                    if done // self.batch_size * workers + worker < self.first:
                        yield Sample("left out")
                    else:
                        random_seed(seed_of(self.seed, 2, self.epoch, worker, done))
                        yield self.samples(f"image {done} of {self.name}", row)
                    done += 1
            except Exception as error:
                # `datasets` has no single type of error for truncated and for foreign files.
                yield Sample(
                    self.name, fatal=f"cannot continue after {done} images: {str(error) or type(error).__name__}"
                )
            if done == before:
                yield Sample(self.name, fatal="has no images")
            passes += 1


def share_of_stream(
    rows: datasets.IterableDataset, rank: int, world: int, workers: int
) -> tuple[datasets.IterableDataset, bool]:
    """Return one process's share of a stream, and whether the process reads only this share.

    Files, or row groups of Parquet files, are distributed over the processes. If there are fewer of them than
    processes, each process reads everything and uses every world-th image.
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
        samples: Converts rows to samples.
        accelerator: The processes.
        batch_size: Images per batch of this process.
        workers: Data-loading workers; for a stream, at most one per file.
        seed: Random seed of the order.
        batches: Batches per epoch.
        balance: Whether to sample all classes with the same probability, with replacement.
        repeats: As for `Order`.
        buffer: Buffer size for shuffling a stream, in images; files are shuffled as well.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    pin_memory = accelerator.device.type == "cuda"
    if data.indices is None:
        rows, alone = share_of_stream(data.train.rows, rank, world, workers)
        if not alone:
            warn(f"{data.train.name} has fewer files than there are processes; each process reads all files")
        name = "the stream" if world == 1 else f"process {rank}'s share of the stream"
        return DataLoader(
            AugmentedStream(rows, samples, seed_of(seed, rank), batch_size, buffer, name),
            batch_size=batch_size,
            num_workers=min(workers, rows.num_shards),
            collate_fn=collate,
            worker_init_fn=ignore_job_signals,
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
        worker_init_fn=ignore_job_signals,
        pin_memory=pin_memory,
    )


def batches(
    loader: DataLoader, epoch: int, first: int = 0, skip_corrupt: bool = False, left_out: set[int | str] | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches of an epoch.

    Args:
        loader: From `training_loader`.
        epoch: Epoch, from 0.
        first: First batch.
        skip_corrupt: Whether to skip images that cannot be decoded.
        left_out: Set that collects the indices of skipped images, or their positions in a stream.

    Yields:
        Images (N, C, H, W) and classes (N,).

    Raises:
        InputError: An image cannot be decoded and `skip_corrupt` is false, or no image of a batch can be decoded.
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
        corrupt_places(bad, skip_corrupt)  # for its errors
        if left_out is not None:
            left_out.update(sample.place if sample.index is None else sample.index for sample in bad)
        if images is None:
            raise InputError(f"no image of a batch can be decoded, such as {bad[0].place}")
        yield images, targets[:, 0]
