"""Batches and evaluation of any task's model, on any number of processes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch.utils.data import DataLoader, Dataset

from res2net_zoo import catalog
from res2net_zoo.tasks.base import NO_IMAGE, Annotated, Figures, Score, TaskModel, reason
from res2net_zoo.training.loader import seed_of
from res2net_zoo.utils.card_metadata import read_card
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import write_atomically
from res2net_zoo.utils.shutdown import ignore_job_signals


class Prepared(Dataset):
    """Images as inputs of a model, with their indices. Augmentation is seeded by (seed, epoch, image)."""

    def __init__(self, data: Annotated, model: TaskModel, train: bool, seed: int = 0, epoch: int = 0) -> None:
        self.data, self.model, self.train, self.seed, self.epoch = data, model, train, seed, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        try:
            image, target = self.data[i]
        except NO_IMAGE as error:
            # Raised in a loader process, the exception's message would include a traceback.
            return i, reason(error, self.data.path(i))
        if self.train:
            set_seed(seed_of(self.seed, 1, self.epoch, i))
        return i, self.model.transform(image, target, self.train)

    def collate(self, samples: list[tuple[int, Any]]) -> tuple[list[int], Any, Any]:
        """Make a batch of indices, images and targets, or of the index of an undecodable image and the reason."""
        for i, sample in samples:
            if isinstance(sample, str):
                return [i], sample, None
        return [i for i, _ in samples], *self.model.collate([sample for _, sample in samples])

    def batches(self, batches: Sequence[Sequence[int]], workers: int) -> Iterator[tuple[list[int], Any, Any]]:
        """Read batches of images by their indices.

        Raises:
            InputError: An image cannot be decoded.
        """
        for numbers, images, targets in DataLoader(
            self,
            batch_sampler=[list(batch) for batch in batches],
            num_workers=workers,
            collate_fn=self.collate,
            worker_init_fn=ignore_job_signals,
        ):
            if isinstance(images, str):
                raise InputError(f"cannot decode {self.data.path(numbers[0])}: {images}")
            yield numbers, images, targets


@torch.inference_mode()
def evaluate(
    model: TaskModel,
    data: Annotated,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
    score: Score | None = None,
) -> Figures:
    """Evaluate a model on annotated images, counting each image once on any number of processes.

    Args:
        model: The model, on its device.
        data: The images.
        accelerator: The accelerator.
        batch_size: Images per batch and process.
        workers: Number of loader processes of each process.
        score: Computes the metrics; defaults to `model.score(data)`. Pass one to read its details afterwards.

    Returns:
        The metrics, the same in all processes.
    """
    was_training = model.training
    model.eval()
    score = model.score(data) if score is None else score
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    with progress_bar(accelerator, total=len(mine), desc="evaluate", unit="image") as bar:
        for numbers, images, targets in Prepared(data, model, train=False).batches(batches, workers):
            with accelerator.autocast():
                predictions = model(send_to_device(images, accelerator.device, non_blocking=True))
            for i, target, prediction in zip(numbers, targets, predictions, strict=True):
                score.update(i, target, prediction)
            bar.update(len(numbers))
    model.train(was_training)
    return score.compute(accelerator)


def expected_figures(
    model: TaskModel, folder: Path, data: str, split: str, published: str | None
) -> tuple[Figures, str]:
    """Return the metrics that a model must reach, and their source.

    Args:
        model: The model.
        folder: The model's folder.
        data: The data it is evaluated on.
        split: The split of the data.
        published: Data set in the paper's tables to compare with; None to compare with the model's card.

    Raises:
        InputError: There are no metrics to compare with.
    """
    if published is not None:
        target = catalog.load().target(model.task, model.settings["head"], model.settings["model"], published)
        return target.figures, target.source
    card = folder / "README.md"
    try:
        metadata: Any = read_card(card).data
        results = metadata.eval_results or []
        figures = {
            result.metric_type: float(result.metric_value)
            for result in results
            if (result.dataset_type, result.dataset_split) == (Path(data).resolve().name, split)
        }
    except Exception as error:  # missing, or any error of huggingface_hub's YAML parser
        raise InputError(f"cannot compare with the card {card}: {reason(error, card)}") from error
    if not figures:
        there = sorted({f"{result.dataset_type}, {result.dataset_split}" for result in results})
        raise InputError(
            f"the card in {folder} has no metrics for the data {Path(data).resolve().name}, {split}; "
            f"it has metrics for {'; '.join(there) or 'no data'}"
        )
    return figures, f"model card in {folder}"


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON atomically.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=indent) + "\n"))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; the figures are printed above") from error
