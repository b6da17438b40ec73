"""Predicting the classes of images, in batches that do not depend on the number of processes."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset

from res2net_zoo.data.images import Samples, read_named
from res2net_zoo.data.preprocessing import Normalize, evaluation_samples
from res2net_zoo.inference.forward import TORCH, create_forward
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.processes import all_or_none
from res2net_zoo.utils.shutdown import ignore_job_signals

if TYPE_CHECKING:
    from res2net_zoo.data.sources import Source

T = TypeVar("T")
# Maps images (N, C, H, W) to logits (N, classes), and to embeddings (N, features) if they are wanted.
Answer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
Row = dict[str, Any]  # the undecoded image, and maybe its label
Numbered = tuple[int, Row | None]  # an index and, in a stream, the row


class FileRows:
    """Rows of image files, created when they are read."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Row:
        return {"image": {"bytes": None, "path": self.paths[index]}}


@dataclass
class Images:
    """Images to predict, in a fixed order.

    Attributes:
        rows: Rows by index, or an iterable of rows for a stream.
        number: Number of images; None if it is unknown before they are read.
        name: Name of the data in messages; empty for image files, which are named by their paths.
        read: Returns the content of a row's image.
        labelled: Whether rows have labels.
        is_stream: Whether rows can only be read in order.
    """

    rows: Any
    number: int | None
    name: str = ""
    read: Callable[[dict[str, Any]], bytes] = read_named
    labelled: bool = False
    is_stream: bool = False

    def __iter__(self) -> Iterator[Numbered]:
        """Yield the index of each image and, in a stream, its row.

        Raises:
            InputError: The stream cannot be read.
        """
        if not self.is_stream:
            yield from ((index, None) for index in range(len(self.rows)))
            return
        index = -1
        try:
            for index, row in enumerate(self.rows):
                yield index, row
        except Exception as error:  # `datasets` raises various errors for truncated or invalid files
            reason = str(error) or type(error).__name__
            raise InputError(f"{self.name}: cannot continue after {index + 1} images: {reason}") from error

    def place(self, index: int, path: str | None) -> str:
        """Return the name of an image in messages."""
        if not self.name and path:
            return path
        return f"image {index} of {self.name}" + (f" ({path})" if path else "")


def images_of_files(paths: Sequence[str]) -> Images:
    """Return image files as images to predict."""
    return Images(FileRows(paths), len(paths))


def images_of_source(source: "Source") -> Images:
    """Return one split of a dataset as images to predict; labels are optional."""
    import datasets

    labelled = "label" in (source.rows.features or {})
    is_stream = isinstance(source.rows, datasets.IterableDataset)
    return Images(source.rows, source.num_rows, source.name, source.read, labelled, is_stream)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer of a model for one image.

    Attributes:
        index: Index of the image.
        path: Its path, if it has one.
        label: Its label, if it has one.
        corrupt: Why it could not be decoded; the following are then empty.
        scores: Scores of the top classes, best first.
        classes: These classes.
        embedding: Pooled features, if they are wanted.
    """

    index: int
    path: str | None
    label: int | None
    corrupt: str | None = None
    scores: Sequence[float] = ()
    classes: Sequence[int] = ()
    embedding: torch.Tensor | None = None


def batches_in_turns(images: Images, batch_size: int, rank: int, world: int) -> Iterator[list[Numbered]]:
    """Yield batches of every world-th image; the batches of all processes together are in order."""
    return batched(islice(images, rank, None, world), batch_size)


def batches_of_shards(
    images: Images, batch_size: int, shard_size: int, done: Collection[int], rank: int, world: int
) -> Iterator[list[Numbered]]:
    """Yield the batches of every world-th shard that is not done; a batch has images of one shard only.

    Args:
        images: The images; of a stream, the rows of other shards are read but not decoded.
        batch_size: Images per batch.
        shard_size: Images per shard.
        done: Numbers of the shards to leave out.
        rank: This process.
        world: Number of processes.
    """
    turn = 0
    for number, shard in groupby(images, key=lambda numbered: numbered[0] // shard_size):
        if number not in done:
            if turn % world == rank:
                yield from batched(shard, batch_size)
            turn += 1


def batched(elements: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """Yield lists of `batch_size` elements; the last one may be shorter."""
    rest = iter(elements)
    while batch := list(islice(rest, batch_size)):
        yield batch


def gathered(batches: Iterator[list[Prediction]]) -> Iterator[Prediction]:
    """Yield the predictions of all processes in order of their images, from those of `batches_in_turns`.

    Raises:
        InputError: It was raised in any process.
    """
    while share := gather_object(all_or_none(lambda: next(batches, []))):
        yield from sorted(share, key=lambda prediction: prediction.index)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome for a row: index, path, label, and why it could not be decoded or would make results wrong."""

    index: int
    path: str | None
    label: int | None
    corrupt: str | None
    fatal: str | None


class Batch(NamedTuple):
    """The decoded images (M, C, H, W) of a batch, in uint8, or None; and the outcomes of its N >= M rows."""

    images: torch.Tensor | None
    outcomes: list[Outcome]


class _Decoded(Dataset):
    """Decodes whole batches, in the workers of a `DataLoader`."""

    def __init__(self, images: Images, samples: Samples) -> None:
        self.rows = None if images.is_stream else images.rows  # streams are read by the main process only
        self.samples = samples

    def __getitem__(self, batch: list[Numbered]) -> Batch:
        decoded, outcomes = [], []
        for index, row in batch:
            row = self.rows[index] if row is None else row  # type: ignore[index]
            sample = self.samples("", row)
            if sample.image is not None:
                decoded.append(sample.image)
            path = (row["image"] or {}).get("path")
            outcomes.append(Outcome(index, path, row.get("label"), sample.corrupt, sample.fatal))
        return Batch(torch.stack(decoded) if decoded else None, outcomes)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def create_answer(
    model: Any, embeddings: bool, backend: str, accelerator: Accelerator, batch_size: int, calibration: Any = None
) -> tuple[Answer, str]:
    """Return the forward pass, and the backend that runs it in all processes.

    Args:
        model: A timm model on the accelerator's device, in eval mode.
        embeddings: Whether to return embeddings, always by plain PyTorch.
        backend: As for `create_forward`.
        accelerator: The processes.
        batch_size: Images of a typical batch.
        calibration: As for `create_forward`.
    """
    if not embeddings:
        forward = create_forward(model, backend, accelerator, batch_size, calibration)
        return lambda images: (forward.call(images), None), forward.backend

    def with_embeddings(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with accelerator.autocast():
            features = model.forward_features(images)
            return model.forward_head(features), model.forward_head(features, pre_logits=True)

    return with_embeddings, TORCH


def predict_batches(
    model: nn.Module,
    answer: Answer,
    images: Images,
    batches: Iterable[list[Numbered]],
    accelerator: Accelerator,
    *,
    topk: int = 5,
    workers: int = 0,
    skip_corrupt: bool = False,
) -> Iterator[list[Prediction]]:
    """Yield the predictions of this process batch by batch, in the order of the batches.

    Args:
        model: The model, which determines the preprocessing.
        answer: Its forward pass, from `create_answer`.
        images: The images.
        batches: Those of this process.
        accelerator: The processes.
        topk: Classes per image.
        workers: Number of worker processes that decode.
        skip_corrupt: Whether to skip images that cannot be decoded.

    Raises:
        InputError: An image cannot be decoded and `skip_corrupt` is false, it cannot be read, or the model's output is
            NaN or infinite.
    """
    # Images are transferred in uint8, as in timm's loader, and normalized on the device.
    samples = evaluation_samples(model, read=images.read, normalize=False)
    normalize = Normalize(model).to(accelerator.device)
    loader: DataLoader = DataLoader(
        _Decoded(images, samples),
        sampler=batches,  # any iterable; it is read in this process
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # of whole batches
        worker_init_fn=ignore_job_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    for decoded, outcomes in loader:
        check_outcomes(images, outcomes, skip_corrupt)
        answers: Iterator[tuple[Any, Any, Any]] = iter(())
        if decoded is not None:
            pixels = normalize(decoded.to(accelerator.device, non_blocking=True))
            answers = top_classes(answer, pixels.contiguous(memory_format=torch.channels_last), topk)
        yield [
            Prediction(row.index, row.path, row.label, row.corrupt, *(() if row.corrupt else next(answers)))
            for row in outcomes
        ]


def check_outcomes(images: Images, outcomes: list[Outcome], skip_corrupt: bool) -> None:
    """Check that the images of a batch could be decoded.

    Raises:
        InputError: As for `predict_batches`, or a label is too large.
    """
    for row in outcomes:
        place = images.place(row.index, row.path)
        if row.fatal is not None:
            raise InputError(f"{place}: {row.fatal}")
        if row.label is not None and not -(2**63) <= row.label < 2**63:
            raise InputError(f"{place} has label {row.label}, which does not fit into 64 bits")
        if row.corrupt is not None and not skip_corrupt:
            what = f"{place} is corrupt ({row.corrupt})"
            raise InputError(f"{what}; remove it, or skip corrupt images", "skip_corrupt")


@torch.inference_mode()
def top_classes(answer: Answer, images: torch.Tensor, topk: int) -> Iterator[tuple[list[float], list[int], Any]]:
    """Return scores and classes of the best predictions for each image, and its embedding or None.

    Args:
        answer: The forward pass.
        images: (N, C, H, W), normalized.
        topk: Classes per image.

    Raises:
        InputError: The model's output is NaN or infinite.
    """
    logits, embeddings = answer(images)
    best = logits.float().softmax(dim=1).topk(min(topk, logits.shape[1]), dim=1)
    if not best.values.isfinite().all():
        raise InputError("the model's output is NaN or infinite; try another precision", "mixed_precision")
    pooled = [None] * len(images) if embeddings is None else list(embeddings.float().cpu().flatten(1))
    return iter(list(zip(best.values.tolist(), best.indices.tolist(), pooled, strict=True)))
