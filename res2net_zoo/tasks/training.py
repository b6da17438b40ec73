"""Training of a task's model: settings, data, model, training loop and model folder."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from res2net_zoo.kernels.training import accelerate_training
from res2net_zoo.tasks import task_class
from res2net_zoo.tasks.base import NO_IMAGE, Annotated, TaskModel
from res2net_zoo.tasks.evaluation import Prepared, evaluate
from res2net_zoo.training.checkpoints import Checkpoints, check_state, is_number, load_newest
from res2net_zoo.training.loader import seed_of
from res2net_zoo.training.loop import Epoch, Loop, Objective, Settings, State, checkpoint_fields, resume
from res2net_zoo.training.metrics import write_metrics
from res2net_zoo.training.optimization import Optimization
from res2net_zoo.training.report import hardware, start_run, write_recipe, writing
from res2net_zoo.utils.console import printable, warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.markdown import markdown_table
from res2net_zoo.utils.processes import all_or_none, wait_for_all, workers_of
from res2net_zoo.weights import bill_of_materials, provenance

CARD = Path(__file__).with_name("card.md")  # template of a model's card


def train(args: argparse.Namespace, run: Path, recipe: dict[str, Any], command: str, accelerator: Accelerator) -> int:
    """Train a task's model, and save the best one by the task's metric as a folder.

    Args:
        args: The settings, named like the options of `train-task`.
        run: Folder for the checkpoints.
        recipe: The settings with a value, in the format of recipe.toml.
        command: The command that reproduces the run, for the card.
        accelerator: The accelerator.

    Returns:
        0, or 128 + the number of the signal that interrupted the training.

    Raises:
        InputError: A setting, the data, the model or a checkpoint is invalid, or the training diverged.
    """
    optimization = Optimization.of(vars(args))  # rejects unknown names before the data are read
    task = task_class(args.task)
    task.check_installed()
    checkpoints = Checkpoints(run / "checkpoints", args.keep)
    is_main = accelerator.is_main_process
    all_or_none(lambda: checkpoints.prepare(args.output, args.resume, args.overwrite) if is_main else None)

    head = args.head or task.heads[0]
    data = all_or_none(lambda: task.open(args.data, args.train_split, head))
    valid = all_or_none(lambda: task.open(args.data, args.eval_split, head, data.classes))
    model = build_model(args, task, head, data, accelerator)
    remarks = {**model.about(), **valid.remarks()}
    facts = {**facts_of(args, model, data, valid, command), **remarks}
    announce(args, model, data, facts, remarks, accelerator)
    settings = settings_for(args, data, accelerator)
    check_readable(valid)

    model = accelerate_training(model.to(accelerator.device).to(memory_format=torch.channels_last))
    optimizer, scheduler = optimization.create(model, settings.steps)
    state = State.create(model, optimizer, scheduler, accelerator)
    plan = plan_of(model, data, settings, accelerator)
    if args.resume:
        resume_if_saved(args, state, plan, checkpoints, settings, accelerator)

    def keep_settings() -> None:
        with writing(args.output):
            start_run(run, recipe)

    # On each machine, because they may not share the folder.
    all_or_none(lambda: keep_settings() if accelerator.is_local_main_process else None)
    objective = Task(args, data, valid, state, plan, recipe, facts, accelerator)
    stopped = Loop(objective, state, settings, checkpoints, accelerator).run()
    if not stopped:
        best = objective.best_epoch()
        value = state.metrics[best - 1][model.best]
        accelerator.print(f"best in epoch {best}: {model.best} {value:.3f}; the model is in {args.output}")
        wait_for_all()
    return stopped


class Task(Objective):
    """Training of a task's model.

    Args:
        args: The settings.
        data: The training data.
        valid: The evaluation data.
        state: The training state.
        plan: Settings that a resumed run must share with this one.
        recipe: The settings with a value, in the format of recipe.toml.
        facts: Entries of the card in addition to the model's settings.
        accelerator: The accelerator.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: Annotated,
        valid: Annotated,
        state: State,
        plan: dict[str, Any],
        recipe: dict[str, Any],
        facts: dict[str, Any],
        accelerator: Accelerator,
    ) -> None:
        self.args, self.data, self.valid, self.state = args, data, valid, state
        self.plan, self.recipe, self.facts, self.accelerator = plan, recipe, facts, accelerator
        self.model: TaskModel = state.model
        self.figure = self.model.best
        self.workers = workers_of(args.workers, accelerator.device)

    def train_mode(self) -> None:
        """Put the model in training mode, except for its frozen layers."""
        self.state.wrapped.train()

    def batches(self, epoch: int, first: int) -> Iterator[tuple[list[int], Any, Any]]:
        """Yield indices of images, images and targets."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        numbers = batches_of(len(self.data), self.args.batch_size, self.args.seed, epoch, rank, world)
        prepared = Prepared(self.data, self.model, train=True, seed=self.args.seed, epoch=epoch)
        return prepared.batches(numbers[first:], self.workers)

    def loss(self, batch: tuple[list[int], Any, Any], step: int, part: int) -> torch.Tensor:
        """Return the sum of the task's losses."""
        _, images, targets = batch
        device = self.accelerator.device
        set_seed(seed_of(self.args.seed, 3, step, self.accelerator.process_index))  # a step has a single batch
        with self.accelerator.autocast():
            try:
                losses = self.state.wrapped(*send_to_device((images, targets), device, non_blocking=True))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):  # raised by BatchNorm
                    raise
                raise InputError(
                    f"{self.model.settings['head']} does not support a batch of {self.args.batch_size} of this size: "
                    f"{error}; increase the batch size or the image size",
                    *("batch_size", "img_size"),
                ) from error
        loss: Any = sum(losses.values())
        return loss

    def checkpoint(self) -> dict[str, Any]:
        """Return the plan."""
        return {"plan": self.plan}

    def evaluate(self, epoch: Epoch) -> dict[str, Any]:
        """Evaluate the model on the evaluation data."""
        figures = evaluate(self.model, self.valid, self.accelerator, self.args.batch_size, self.workers)
        return {"epoch": epoch.number, "lr": epoch.lr, "loss": float(f"{epoch.loss:.5g}"), **figures}

    def best_epoch(self) -> int:
        """Return the number of the first epoch with the best metric."""
        return max(self.state.metrics, key=lambda row: row[self.figure])["epoch"]

    def describe(self, row: Mapping[str, Any]) -> str:
        """Return learning rate, loss and figures of an epoch as text."""
        return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")

    def write(self) -> None:
        """Write all metrics, and the model if the last epoch is the best."""
        metrics, output = self.state.metrics, self.args.output
        with writing(output):
            if self.best_epoch() == len(metrics):
                self.model.save(output, make_card(self.model, metrics[-1], self.accelerator, output, self.facts))
                write_recipe(output, self.recipe)
            write_metrics(output, metrics)
            bill_of_materials.update(output)


def build_model(
    args: argparse.Namespace, task: type[TaskModel], head: str, data: Annotated, accelerator: Accelerator
) -> TaskModel:
    """Build the model for training, with the same weights in every process.

    Raises:
        InputError: The model cannot be built or trained with these settings.
    """
    options = all_or_none(lambda: task.options(data, args.flip_pairs))
    set_seed(args.seed)
    model = all_or_none(
        lambda: task(
            args.model,
            data.classes,
            head=head,
            img_size=args.img_size,
            output_stride=args.output_stride,
            head_kwargs=dict(args.head_kwargs),
            pretrained=args.pretrained,
            **options,
        )
    )
    if args.scales is not None:
        if model.scales is None:
            raise InputError(f"{task.task} does not use random scaling; omit the scales", "scales")
        low, high = sorted(args.scales)
        model.scales = (low, high)
    model.freeze(args.freeze, args.freeze_bn)
    if args.freeze_bn and not args.pretrained and accelerator.is_main_process:
        message = "BatchNorm is frozen without pretrained weights; random weights hardly learn this way"
        warn(message, "freeze_bn", "pretrained")
    before = model.origin
    model.origin = all_or_none(lambda: before.after_training(start_of(args), args.license))
    if accelerator.is_main_process:
        provenance.warn_of_other_license(before, model.origin)
    return model


def start_of(args: argparse.Namespace) -> str | None:
    """Return the name of the pretrained weights that training starts from; None for random weights."""
    return provenance.shown(args.model) if args.pretrained else None


def facts_of(
    args: argparse.Namespace, model: TaskModel, data: Annotated, valid: Annotated, command: str
) -> dict[str, Any]:
    """Return the card's entries about a training run."""
    return {
        "data": Path(args.data).resolve().name,
        "split": args.eval_split,
        data.samples: f"{len(data)} of {args.train_split}, {len(valid)} of {args.eval_split}",
        "start": start_of(args) or "random weights",
        "license": model.origin.license,
        "recipe": args.recipe,
        "command": command,
    }


def announce(
    args: argparse.Namespace,
    model: TaskModel,
    data: Annotated,
    facts: Mapping[str, Any],
    remarks: Mapping[str, str],
    accelerator: Accelerator,
) -> None:
    """Print a summary of the model and the data."""
    classes = ", ".join(map(printable, data.classes[:5])) + ", ..." * (len(data.classes) > 5)
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(
        f"task: {model.task}, {model.settings['head']} on {args.model}, {parameters:,} parameters",
        f"data: {args.data}, {data.samples} {facts[data.samples]}; {classes}",
        *(f"{name}: {printable(remark)}" for name, remark in remarks.items()),
        sep="\n",
        flush=True,
    )


def settings_for(args: argparse.Namespace, data: Annotated, accelerator: Accelerator) -> Settings:
    """Return the loop's settings.

    Raises:
        InputError: There are fewer images than one step needs.
    """
    step_images = args.batch_size * accelerator.num_processes
    if len(data) < step_images:
        raise InputError(
            f"there are {len(data)} {data.samples} to train on, but a step needs {step_images}; reduce the batch size",
            "batch_size",
        )
    return Settings(
        epochs=args.epochs,
        steps=len(data) // step_images,
        step_images=step_images,
        clip_grad=args.clip_grad,
        save_minutes=args.save_minutes,
    )


def batches_of(images: int, batch_size: int, seed: int, epoch: int, rank: int, world: int) -> list[list[int]]:
    """Return the batches of a process in an epoch: its part of each step's images.

    A step has the same images on any number of processes, as long as the global batch size is the same.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed_of(seed, 2, epoch))).tolist()
    whole = batch_size * world
    return [order[i : i + batch_size] for i in range(rank * batch_size, images - images % whole, whole)]


def check_readable(data: Annotated) -> None:
    """Check before training that the evaluation data are not empty and that the first image can be decoded.

    Raises:
        InputError: They are empty, or it cannot be decoded.
    """
    if not len(data):
        raise InputError(f"there are no {data.samples} to evaluate the model on; name another split", "eval_split")
    try:
        data[0]
    except NO_IMAGE as error:
        raise InputError(f"cannot decode {data.path(0)}, an evaluation image: {error}") from error


def plan_of(model: TaskModel, data: Annotated, settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """Return the settings that a resumed run must share with this one."""
    return {
        "settings": model.settings,
        "task": model.task,
        "images": len(data),
        "images a step": settings.step_images,
        "precision": accelerator.mixed_precision,
    }


def resume_if_saved(
    args: argparse.Namespace,
    state: State,
    plan: Mapping[str, Any],
    checkpoints: Checkpoints,
    settings: Settings,
    accelerator: Accelerator,
) -> None:
    """Restore the state of the last checkpoint, if there is one.

    Raises:
        InputError: The checkpoint is damaged or belongs to a different run.
    """
    path, saved = load_newest(checkpoints, accelerator)
    if saved is None:
        return
    if isinstance(saved, dict) and "sums" in saved:  # the key in earlier versions
        saved |= {"losses": saved.pop("sums"), "rates": [], "ema": None}
    figures = {"lr": is_number, "loss": is_number, state.model.best: lambda x: isinstance(x, float)}
    fields = checkpoint_fields(figures, average=False)
    fields["plan"] = lambda x: isinstance(x, dict) and plan.keys() <= x.keys()
    check_state(saved, path, fields)
    for key, value in plan.items():
        if saved["plan"][key] != value:
            raise InputError(
                f"the run in {args.output} was started with {key} {saved['plan'][key]}, but now has {value}; "
                "use the same value, or overwrite it",
                "overwrite",
            )
    resume(state, saved, path, args.output, settings, accelerator)
    accelerator.print(f"resuming after step {state.done} of {settings.total}", flush=True)


def make_card(
    model: TaskModel, row: Mapping[str, Any], accelerator: Accelerator, output: Path, facts: Mapping[str, Any]
) -> ModelCard:
    """Return the card of a model.

    Args:
        model: The model.
        row: Metrics of the model's epoch.
        accelerator: The accelerator.
        output: The model's folder, which has the name of the model.
        facts: Further entries of the card: at least `data` and `split`, which the metrics refer to.
    """
    figures = {name: value for name, value in row.items() if name not in ("epoch", "lr", "loss")}
    res2net = "res2n" in model.settings["model"]  # matches Res2NeXt too
    shown: dict[str, Any] = {"task": model.task}
    shown |= {key: value for key, value in model.settings.items() if key not in ("classes", "flip_pairs")}
    shown |= {"classes": len(model.settings["classes"]), **facts, "hardware": hardware(accelerator)}
    rows = [(name.replace("_", " "), value) for name, value in shown.items() if value not in (None, {})]
    metadata = ModelCardData(
        model_name=output.name,
        library_name="res2net-zoo",
        pipeline_tag=model.hub_task,
        tags=[*(["res2net"] if res2net else []), model.settings["head"], model.task],
        eval_results=results_of(model, figures, facts["data"], facts["split"]),
        license=model.origin.license,
        base_model=model.origin.base_model,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(CARD),
        name=output.name,
        task=model.task.capitalize(),
        head=model.settings["head"],
        model=model.settings["model"],
        res2net=res2net,
        figures=markdown_table(("figure", "value"), [(name, f"{value:.3f}") for name, value in figures.items()]),
        settings=markdown_table(("setting", "value"), rows),
    )


def results_of(model: TaskModel, figures: Mapping[str, float], data: str, split: str) -> list[EvalResult]:
    """Return the metrics as evaluation results for a card's metadata."""
    return [
        EvalResult(model.hub_task, data, data, name, round(value, 4), dataset_split=split)
        for name, value in figures.items()
    ]
