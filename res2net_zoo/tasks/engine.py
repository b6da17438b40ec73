"""Training and evaluation of any task's model, on any number of processes."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from timm.utils import distribute_bn
from torch.utils.data import DataLoader, Dataset

from res2net_zoo import catalog
from res2net_zoo.data.images import open_image
from res2net_zoo.tasks.base import NO_IMAGE, Annotated, Figures, Score, TaskModel, reason
from res2net_zoo.tasks.upright import to_rgb
from res2net_zoo.training.checkpoints import (
    Checkpoints,
    Fits,
    are_finite,
    are_metrics,
    check_progress,
    check_state,
    is_count,
    is_number,
    restore,
    restore_optimizer,
    restoring,
)
from res2net_zoo.training.data import seed_of
from res2net_zoo.training.report import hardware, plainly, start_run, write_metrics, write_recipe
from res2net_zoo.training.setup import Optimization, highest_rate
from res2net_zoo.utils.card_metadata import read_card
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import write_atomically
from res2net_zoo.utils.markdown import markdown_table
from res2net_zoo.utils.shutdown import Stop, spare_worker


class Prepared(Dataset):
    """Images as a model takes them, with their numbers. What is random follows from (seed, epoch, image)."""

    def __init__(self, data: Annotated, model: TaskModel, train: bool, seed: int = 0, epoch: int = 0) -> None:
        self.data, self.model, self.train, self.seed, self.epoch = data, model, train, seed, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        try:
            image, target = self.data[i]
        except NO_IMAGE as error:
            return i, reason(
                error, self.data.path(i)
            )  # an exception of a loader's process would come with its traceback
        if self.train:
            set_seed(seed_of(self.seed, 1, self.epoch, i))
        return i, self.model.transform(image, target, self.train)

    def collate(self, samples: list[tuple[int, Any]]) -> tuple[list[int], Any, Any]:
        """Make a batch: numbers, images, targets; or the number of an image that is none, and why."""
        for i, sample in samples:
            if isinstance(sample, str):
                return [i], sample, None
        return [i for i, _ in samples], *self.model.collate([sample for _, sample in samples])

    def batches(self, batches: Sequence[Sequence[int]], workers: int) -> Iterator[tuple[list[int], Any, Any]]:
        """Read batches of images, by their numbers.

        Raises:
            InputError: An image cannot be decoded.
        """
        for numbers, images, targets in DataLoader(
            self,
            batch_sampler=[list(batch) for batch in batches],
            num_workers=workers,
            collate_fn=self.collate,
            worker_init_fn=spare_worker,
        ):
            if isinstance(images, str):
                raise InputError(f"cannot decode {self.data.path(numbers[0])}: {images}")
            yield numbers, images, targets


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    return {key: to_device(item, device) for key, item in value.items()} if isinstance(value, dict) else value


@torch.inference_mode()
def evaluate(
    model: TaskModel,
    data: Annotated,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
    score: Score | None = None,
) -> Figures:
    """Measure a model on annotated images, each of which counts once on any number of processes.

    Args:
        model: The model, on its device.
        data: The images.
        accelerator: The processes.
        batch_size: Images a batch and process.
        workers: Loader processes of each process.
        score: What is to collect the figures, `model.score(data)`, to ask for more afterwards.

    Returns:
        The figures, the same in all processes.
    """
    was_training = model.training
    model.eval()
    score = model.score(data) if score is None else score
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    with progress_bar(accelerator, total=len(mine), desc="evaluate", unit="image") as bar:
        for numbers, images, targets in Prepared(data, model, train=False).batches(batches, workers):
            with accelerator.autocast():
                predictions = model(to_device(images, accelerator.device))
            for i, target, prediction in zip(numbers, targets, predictions, strict=True):
                score.update(i, target, prediction)
            bar.update(len(numbers))
    model.train(was_training)
    return score.compute(accelerator)


@dataclass
class Plan:
    """How to train.

    Attributes:
        output: Folder of the best model.
        checkpoints: Those of the run.
        optimization: Optimizer and learning rate, and for how many epochs.
        batch_size: Images a batch and process.
        clip_grad: Largest norm of the gradient; None for any.
        seed: Of all that is random.
        workers: Loader processes of each process.
        save_minutes: Time between checkpoints within an epoch.
        settings: All settings of the program, for recipe.toml.
        facts: What the card tells beside these: at least `data` and `split`, that the figures are of.
    """

    output: Path
    checkpoints: Checkpoints
    optimization: Optimization
    batch_size: int = 8
    clip_grad: float | None = None
    seed: int = 0
    workers: int = 1
    save_minutes: float = 15.0
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def batches_of(images: int, plan: Plan, epoch: int, rank: int, world: int) -> list[list[int]]:
    """Return a process's batches of an epoch: its part of each step's images.

    The step's images do not depend on the number of processes, if they are as many together.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed_of(plan.seed, 2, epoch))).tolist()
    whole = plan.batch_size * world
    starts = range(rank * plan.batch_size, images - images % whole, whole)
    return [order[i : i + plan.batch_size] for i in starts]


def check_readable(data: Annotated) -> None:
    """Find out before any work is done whether there is an image to measure on.

    Raises:
        InputError: There is none, or the first one cannot be decoded.
    """
    if not len(data):
        raise InputError(f"there are no {data.samples} to measure the model on; name another --eval-split")
    try:
        data[0]
    except NO_IMAGE as error:
        raise InputError(f"cannot decode {data.path(0)}, which the model is measured on: {error}") from error


def train(model: TaskModel, data: Annotated, valid: Annotated, accelerator: Accelerator, plan: Plan) -> int:
    """Train a model, and write the best by its task's figure as a folder.

    Args:
        model: The model, with the weights to start from.
        data: Images to train on.
        valid: Images to measure it on, after each epoch.
        accelerator: The processes.
        plan: How.

    Returns:
        0, or 128 and a signal's number where that stopped it; `train` goes on from the last checkpoint.

    Raises:
        InputError: It cannot be trained so, or the loss is no number any more.
    """
    world, main_process = accelerator.num_processes, accelerator.is_main_process
    steps = len(data) // (plan.batch_size * world)
    if not steps:
        raise InputError(
            f"there are {len(data)} {data.samples} to train on, and a step takes {plan.batch_size * world}; "
            "lower --batch-size"
        )
    check_readable(valid)
    checkpoints, epochs = plan.checkpoints, plan.optimization.epochs
    bare: Any = model
    bare.to(accelerator.device, memory_format=torch.channels_last)
    optimizer, scheduler = plan.optimization.create(model, steps)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    now = {"settings": bare.settings, "task": bare.task, "images": len(data), "images a step": plan.batch_size * world}
    now["precision"] = accelerator.mixed_precision
    done, metrics, sums = 0, [], torch.zeros(2, device=accelerator.device)  # of losses in this epoch, and their number
    if (state := checkpoints.load()) is not None:
        path = checkpoints.paths()[-1]
        state = check_checkpoint(state, path, now, bare.best)
        for key, value in now.items():
            if state["plan"][key] != value:
                raise InputError(
                    f"the run in {plan.output} was started with {key} {state['plan'][key]}, and has now {value}; "
                    "go on with the same, or --overwrite it"
                )
        restore(path, "model", bare, state["model"])
        restore_optimizer(path, optimizer, state["optimizer"])
        if accelerator.scaler is not None:
            with restoring(path):
                accelerator.scaler.load_state_dict(state["scaler"])
        done, metrics = state["done"], state["metrics"]
        check_progress(path, done, metrics, steps)
        if main_process:
            sums += state["sums"].to(accelerator.device)
        if len(metrics) >= epochs:
            raise InputError(f"the run in {plan.output} has done {len(metrics)} epochs; --epochs {epochs} is no more")
        accelerator.print(f"goes on after step {done} of {epochs * steps}", flush=True)
        if scheduler is not None:  # --sched none
            scheduler.step_update(done)
    if main_process:
        with plainly(plan.output):
            start_run(checkpoints.folder.parent, plan.settings)

    def save() -> None:
        everybodys = accelerator.reduce(sums, "sum").cpu()
        if main_process:
            scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
            everything = {"model": bare.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler}
            checkpoints.save(done, {"plan": now, "done": done, "metrics": metrics, "sums": everybodys, **everything})

    bar = progress_bar(accelerator, total=epochs * steps, initial=done, desc="train", unit="step")
    saved = time.monotonic()
    with Stop(accelerator) as stop, bar as progress:
        for epoch in range(len(metrics), epochs):
            wrapped.train()
            batches = batches_of(len(data), plan, epoch, accelerator.process_index, world)[done - epoch * steps :]
            prepared = Prepared(data, bare, train=True, seed=plan.seed, epoch=epoch)
            for _, images, targets in prepared.batches(batches, plan.workers):
                # All that is random from here on follows from the place in the run, so that it can go on anywhere.
                set_seed(seed_of(plan.seed, 3, done, accelerator.process_index))
                with accelerator.autocast():
                    try:
                        losses = wrapped(to_device(images, accelerator.device), to_device(targets, accelerator.device))
                    except ValueError as error:
                        if "more than 1 value per channel" not in str(error):  # BatchNorm's words
                            raise
                        raise InputError(
                            f"{bare.settings['head']} takes no batch of {plan.batch_size} of this size: {error}; "
                            "raise --batch-size or --img-size"
                        ) from error
                loss = sum(losses.values())
                accelerator.backward(loss)
                if plan.clip_grad is not None:
                    accelerator.clip_grad_norm_(wrapped.parameters(), plan.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                sums += torch.stack([loss.detach(), torch.ones_like(loss)])
                if scheduler is not None:
                    scheduler.step_update(done)
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
                late = main_process and time.monotonic() - saved > 60 * plan.save_minutes
                heard, bad, late = stop.agree(0 if torch.isfinite(loss) else done, late)
                if bad:
                    raise InputError(
                        f"the training has diverged: the loss is no number, in step {bad}; a lower --lr may help"
                    )
                if late or heard:
                    save()
                    saved = time.monotonic()
                if heard:
                    progress.close()
                    accelerator.print(
                        f"stopped by {signal.Signals(heard).name} after step {done}; the same command "
                        "with --resume goes on",
                        flush=True,
                    )
                    accelerator.wait_for_everyone()
                    return 128 + heard
            if world > 1:  # as each process has seen other batches
                distribute_bn(bare, world, reduce=False)
            figures = evaluate(bare, valid, accelerator, plan.batch_size, plan.workers)
            total, number = accelerator.reduce(sums, "sum").tolist()
            sums.zero_()
            row = {"epoch": epoch + 1, "lr": highest_rate(optimizer), "loss": float(f"{total / max(number, 1):.5g}")}
            metrics.append({**row, **figures})
            best = max(range(len(metrics)), key=lambda i: metrics[i][bare.best])
            if main_process:
                with progress.external_write_mode():
                    shown = ", ".join(f"{name} {value:.4g}" for name, value in [*metrics[-1].items()][1:])
                    print(f"epoch {epoch + 1:3}: {shown}", flush=True)
                with plainly(plan.output):
                    if best == len(metrics) - 1:
                        bare.save(plan.output, make_card(bare, metrics, accelerator, plan))
                        write_recipe(plan.output, plan.settings)
                    write_metrics(plan.output, metrics)
            save()
            saved = time.monotonic()
    if main_process:
        print(f"best in epoch {best + 1}: {bare.best} {metrics[best][bare.best]:.3f}; the model is in {plan.output}")
    accelerator.wait_for_everyone()
    return 0


def check_checkpoint(state: Any, path: Path, plan: dict[str, Any], best: str) -> dict[str, Any]:
    """Find out whether a checkpoint, which may be any file, holds what a run needs to go on.

    Args:
        state: What was read of it.
        path: The checkpoint.
        plan: What the run compares with that of before.
        best: The figure by which the best epoch is chosen.

    Raises:
        InputError: It holds something else.
    """
    fields: dict[str, Fits] = {
        "plan": lambda x: isinstance(x, dict) and plan.keys() <= x.keys(),
        "done": is_count,
        "metrics": lambda x: are_metrics(x, {"lr": is_number, "loss": is_number, best: lambda y: isinstance(y, float)}),
        "sums": lambda x: are_finite(x, 2),
        "model": lambda x: isinstance(x, dict),
        "optimizer": lambda x: isinstance(x, dict),
        "scaler": lambda x: True,
    }
    return check_state(state, path, fields)


def make_card(model: TaskModel, metrics: Sequence[dict[str, Any]], accelerator: Accelerator, plan: Plan) -> ModelCard:
    """Make the card of the model as it is after the last of these epochs."""
    figures = {name: value for name, value in metrics[-1].items() if name not in ("epoch", "lr", "loss")}
    res2net = "res2n" in model.settings["model"]  # as all of them are called, Res2NeXt's too
    paper = ", a Res2Net (Gao et al., TPAMI 2021, arXiv 1904.01169)" * res2net
    facts = {
        "task": model.task,
        **{key: value for key, value in model.settings.items() if key not in ("classes", "flip_pairs")},
    }
    facts |= {"classes": len(model.settings["classes"]), **plan.facts, "hardware": hardware(accelerator)}
    results = [
        EvalResult(
            model.hub_task,
            plan.facts["data"],
            plan.facts["data"],
            name,
            round(value, 4),
            dataset_split=plan.facts["split"],
        )
        for name, value in figures.items()
    ]
    data = ModelCardData(
        model_name=plan.output.name,
        library_name="res2net-zoo",
        pipeline_tag=model.hub_task,
        tags=[*(["res2net"] if res2net else []), model.settings["head"], model.task],
        eval_results=results,
        license=model.origin.license,
        base_model=model.origin.base_model,
    )
    rows = [(name.replace("_", " "), value) for name, value in facts.items() if value not in (None, {})]
    text = "\n\n".join(
        [
            f"# {plan.output.name}",
            f"{model.task.capitalize()} by {model.settings['head']} on {model.settings['model']}{paper}.",
            markdown_table(("figure", "value"), [(name, f"{value:.3f}") for name, value in figures.items()]),
            markdown_table(("setting", "value"), rows),
            '```python\nfrom res2net_zoo import tasks\n\nmodel = tasks.load("hf-hub:ORG/NAME")  # or this folder\n```',
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def expected_figures(
    model: TaskModel, folder: Path, data: str, split: str, published: str | None
) -> tuple[Figures, str]:
    """Return the figures that a model is to reach, and where they are from.

    Args:
        model: The model.
        folder: Its folder.
        data: What it is measured on.
        split: Which split of it.
        published: Data of the paper's tables, to take its figures; else those of the model's card.

    Raises:
        InputError: There are none.
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
    except Exception as error:  # missing, or whatever huggingface_hub's parser of YAML fails at
        raise InputError(f"cannot compare with the card {card}: {reason(error, card)}") from error
    if not figures:
        there = sorted({f"{result.dataset_type}, {result.dataset_split}" for result in results})
        raise InputError(
            f"the card in {folder} has no figures of data called {Path(data).resolve().name}, {split}; "
            f"it has some of {'; '.join(there) or 'nothing'}"
        )
    return figures, f"model card in {folder}"


def pictures(
    model: TaskModel,
    paths: Sequence[Path],
    accelerator: Accelerator,
    boxes: Callable[[Image.Image], Sequence[Sequence[float]]] | None = None,
) -> Iterator[tuple[Path, Image.Image]]:
    """Draw what a model sees in images, one after the other.

    Args:
        model: The model.
        paths: The images.
        accelerator: The process.
        boxes: What finds the left, top, width and height of those that the model is to see one by one.
    """
    for path in progress_bar(accelerator, paths, desc="predict", unit="image"):
        try:
            with open_image(path) as file:
                image = to_rgb(file)
        except NO_IMAGE as error:
            raise InputError(f"cannot decode {path}: {reason(error, path)}") from error
        drawn = image.copy()
        try:
            for target in [{}] if boxes is None else [{"box": box} for box in boxes(image)]:
                images, _ = model.collate([model.transform(image, target, False)])
                with torch.inference_mode(), accelerator.autocast():
                    (prediction,) = model(to_device(images, accelerator.device))
                drawn = model.draw(drawn, prediction)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        yield path, drawn


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON, whole or not at all.

    Raises:
        InputError: It cannot be written.
    """
    try:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=indent) + "\n"))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; the figures are printed above") from error
