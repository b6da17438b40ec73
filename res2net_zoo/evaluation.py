"""Exact evaluation: every image is counted once, on any number of processes.

Correct predictions are counted as integers. Each process counts its own share of the images, without
padding the last batch, and the counts are summed at the end.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from res2net_zoo.data.images import MapSamples, Sample
from res2net_zoo.data.labels import Classes
from res2net_zoo.data.preprocessing import Normalize, evaluation_samples
from res2net_zoo.data.sources import Source, StreamSamples
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.processes import all_or_none, autocasting
from res2net_zoo.utils.shutdown import ignore_job_signals
from res2net_zoo.utils.throughput import Throughput, measure

TOPK = 5
NOT_FINITE = "the model's output is NaN or infinite"

# Called with a batch's images (N, C, H, W) in uint8, correct classes (N, K) padded with -1, and logits (N, classes).
Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class Counts:
    """Numbers of images.

    Attributes:
        samples: Evaluated images.
        top1: Evaluated images whose first prediction is correct.
        top5: Evaluated images with a correct prediction among the first five.
        unlabelled: Images without a correct class, which are not evaluated (in ImageNet-ReaL).
        corrupt: Names of the images that could not be decoded.
        seconds: Duration, in the slowest process.
    """

    samples: int = 0
    top1: int = 0
    top5: int = 0
    unlabelled: int = 0
    corrupt: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.samples + other.samples,
            self.top1 + other.top1,
            self.top5 + other.top5,
            self.unlabelled + other.unlabelled,
            self.corrupt + other.corrupt,
            max(self.seconds, other.seconds),
        )

    @property
    def num_rows(self) -> int:
        """Number of images that were read, whether evaluated or not."""
        return self.samples + self.unlabelled + len(self.corrupt)

    def percent(self, correct: int) -> float:
        """Return a number of images as a percentage of the evaluated ones, rounded to three decimals."""
        return round(100 * correct / self.samples, 3)


def collate(batch: list[Sample]) -> tuple[torch.Tensor | None, torch.Tensor, list[Sample]]:
    """Collate samples to a batch.

    Args:
        batch: N samples.

    Returns:
        Transformed images (M, C, H, W), or None for M = 0; correct classes (M, K), padded with -1;
        the samples that have errors instead of images.
    """
    good = [sample for sample in batch if sample.image is not None]
    bad = [sample for sample in batch if sample.image is None]
    images = torch.stack([sample.image for sample in good if sample.image is not None]) if good else None
    targets = [torch.tensor(sample.target, dtype=torch.long) for sample in good]
    return (
        images,
        nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1) if good else torch.empty(0, 0),
        bad,
    )


def create_loader(
    source: Source,
    model: nn.Module,
    classes: Classes,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
) -> DataLoader:
    """Create the data loader for this process's share of the images.

    Args:
        source: The images.
        model: The model, whose config determines timm's preprocessing.
        classes: The mapping of the labels to the model's classes.
        accelerator: The processes.
        batch_size: Images per batch.
        workers: Number of worker processes.

    Returns:
        A loader of batches from `collate`, with images in uint8.
    """
    # Images are transferred in uint8, as in timm's loader, and normalized on the device by `count_correct`.
    samples = evaluation_samples(model, classes.targets, source.read, normalize=False)
    rank, world = accelerator.process_index, accelerator.num_processes
    dataset: torch.utils.data.Dataset
    if isinstance(source.rows, datasets.Dataset):
        # Every world-th image, so that the numbers of images differ by at most one.
        dataset = MapSamples(source.rows, samples, range(rank, len(source.rows), world))
    else:
        rows = split_dataset_by_node(source.rows, rank, world)
        workers = min(workers, rows.num_shards)
        dataset = StreamSamples(rows, samples, "the stream" if world == 1 else f"process {rank}'s share of the stream")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ignore_job_signals,
        pin_memory=accelerator.device.type == "cuda",
    )


def corrupt_places(bad: Iterable[Sample], skip_corrupt: bool) -> list[str]:
    """Return the places of the images that cannot be decoded.

    Args:
        bad: Samples without an image.
        skip_corrupt: Whether to skip images that cannot be decoded.

    Raises:
        InputError: An image is corrupt and `skip_corrupt` is false, or a label is missing or invalid.
    """
    places = []
    for sample in bad:
        if sample.fatal is not None:
            raise InputError(f"{sample.place}: {sample.fatal}")
        if not skip_corrupt:
            hint = "remove it, or skip corrupt images"
            raise InputError(f"{sample.place} is corrupt ({sample.corrupt}); {hint}", "skip_corrupt")
        places.append(sample.place)
    return places


def count_batch(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Count the correct predictions in a batch.

    Args:
        logits: (N, classes).
        targets: Correct classes (N, K), padded with -1.

    Returns:
        Three integers: evaluated images, and those that are correct by top-1 and by top-5.

    Raises:
        InputError: The logits are NaN or infinite.
    """
    answers = logits.float().topk(min(TOPK, logits.shape[1]), dim=1)
    if not answers.values.isfinite().all():
        raise InputError(f"{NOT_FINITE}; try another precision", "mixed_precision")
    right = (answers.indices.unsqueeze(2) == targets.unsqueeze(1)).any(2)
    counted = (targets >= 0).any(1)
    return torch.stack([counted.sum(), right[:, 0].sum(), right.any(1).sum()])


def advance(progress: tqdm, images: int) -> None:
    """Advance a progress bar by the images of one batch per process; the last batches may be shorter."""
    progress.update(images if progress.total is None else min(images, progress.total - progress.n))


@torch.inference_mode()
def count_correct(
    model: nn.Module,
    loader: Iterable,
    accelerator: Accelerator,
    subset: list[int] | None = None,
    skip_corrupt: bool = False,
    progress: tqdm | None = None,
    observe: Observer | None = None,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Counts:
    """Count correct predictions for the images of one process.

    Args:
        model: The model, on the accelerator's device, in evaluation mode.
        loader: Yields batches from `collate`.
        accelerator: Determines device and precision.
        subset: Classes to predict among; None for all.
        skip_corrupt: Whether to skip images that cannot be decoded.
        progress: Progress bar that counts images.
        observe: Called with each batch, see `Observer`.
        forward: Maps images to logits, instead of the model in the accelerator's precision.

    Returns:
        This process's counts.

    Raises:
        InputError: An image is corrupt and `skip_corrupt` is false, a label is missing or invalid,
            or the model's output is NaN or infinite.
    """
    device = accelerator.device
    forward = forward or autocasting(model, accelerator)
    normalize = Normalize(model).to(device)
    kept = None if subset is None else torch.tensor(subset, device=device)
    counts = Counts()
    correct = torch.zeros(3, dtype=torch.long, device=device)
    start = time.perf_counter()
    for images, targets, bad in loader:
        counts.corrupt += corrupt_places(bad, skip_corrupt)
        if images is not None:
            pixels = images.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            images = normalize(pixels).contiguous(memory_format=torch.channels_last)
            logits = forward(images)
            if kept is not None:
                logits = logits[:, kept]
            correct += count_batch(logits, targets)
            counts.unlabelled += len(images)
            if observe is not None:
                observe(pixels, targets, logits.float())
        if progress is not None:
            read = len(bad) + (0 if images is None else len(images))
            advance(progress, read * accelerator.num_processes)
    counts.samples, counts.top1, counts.top5 = correct.tolist()
    counts.unlabelled -= counts.samples
    counts.seconds = time.perf_counter() - start
    return counts


def evaluate(
    model: nn.Module,
    source: Source,
    classes: Classes,
    accelerator: Accelerator,
    batch_size: int = 64,
    workers: int = 1,
    skip_corrupt: bool = False,
    desc: str = "validate",
    observe: Observer | None = None,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Counts:
    """Count correct predictions for all images, on all processes.

    Args:
        model: The model, on the accelerator's device; set to evaluation mode.
        source: The images.
        classes: The mapping of the labels to the model's classes.
        accelerator: The processes.
        batch_size: Images per batch and process.
        workers: Number of worker processes per process.
        skip_corrupt: Whether to skip images that cannot be decoded.
        desc: Description on the progress bar.
        observe: Called with each batch of this process, see `Observer`.
        forward: As for `count_correct`.

    Returns:
        The counts over all processes, the same in each.

    Raises:
        InputError: As for `count_correct`, or there is no image to evaluate; raised in all processes.
    """
    model.eval()
    loader = create_loader(source, model, classes, accelerator, batch_size, workers)
    with progress_bar(accelerator, total=source.num_rows, desc=desc, unit="image") as progress:
        counts = all_or_none(
            lambda: count_correct(model, loader, accelerator, classes.subset, skip_corrupt, progress, observe, forward),
        )
    shares: list[dict[str, Any]] = gather_object([asdict(counts)])
    summed = sum((Counts(**share) for share in shares), Counts())
    if not summed.samples:
        unread = f": {len(summed.corrupt)} cannot be decoded" * bool(summed.corrupt)
        raise InputError(f"{source.name} has no image to evaluate in split {source.split}{unread}")
    return summed


@torch.inference_mode()
def measure_throughput(
    model: nn.Module,
    source: Source,
    classes: Classes,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
    forward: Callable[[torch.Tensor], torch.Tensor],
    whole: float,
) -> Throughput:
    """Measure data loading and the model's forward pass alone, for a few seconds each.

    Args:
        model: The model, as for `evaluate`.
        source: The images.
        classes: The mapping of the labels to the model's classes.
        accelerator: The processes.
        batch_size: Images per batch and process.
        workers: Number of worker processes per process.
        forward: Maps images to logits.
        whole: Images per second of `evaluate`.

    Raises:
        InputError: A process has no images.
    """
    normalize = Normalize(model).to(accelerator.device)

    def images_of(batch: tuple[torch.Tensor | None, torch.Tensor, list[Sample]]) -> int:
        return 0 if batch[0] is None else len(batch[0])

    def classify(batch: tuple[torch.Tensor, torch.Tensor, list[Sample]]) -> torch.Tensor:
        pixels = batch[0].to(accelerator.device, non_blocking=True)
        return forward(normalize(pixels).contiguous(memory_format=torch.channels_last))

    loader = create_loader(source, model, classes, accelerator, batch_size, workers)
    return measure(lambda: loader, images_of, classify, whole, loader.num_workers)
