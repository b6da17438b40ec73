"""Training of a classifier, from settings to the model folder."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, broadcast
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from res2net_zoo.data.images import Samples
from res2net_zoo.training.augmentation import training_samples
from res2net_zoo.training.checkpoints import Checkpoints, Fits, check_state, is_count, is_number, load_newest
from res2net_zoo.training.classification import Classification, build_model, build_network
from res2net_zoo.training.data import TrainingData, check_readable, corrupt_images, open_training_data, steps_of
from res2net_zoo.training.loader import training_loader
from res2net_zoo.training.loop import Loop, Settings, State, checkpoint_fields, resume
from res2net_zoo.training.metrics import best_of
from res2net_zoo.training.optimization import Optimization, scaled_lr
from res2net_zoo.training.report import Mistakes, Report, hardware
from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.processes import all_or_none, start_processes, wait_for_all, workers_of
from res2net_zoo.utils.throughput import Throughput, measure


def start(args: argparse.Namespace, run: Path) -> Accelerator:
    """Create the accelerator with the trackers of `args`.

    Args:
        args: The settings; `mixed_precision` is updated, because `accelerate launch` may set it.
        run: Folder of the run's checkpoints and trackers.

    Raises:
        InputError: A tracker is not installed, or `accelerate config` shards the model.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    wanted = args.tracker or [name for name in ("tensorboard",) if name in available]
    wanted = [] if wanted == ["none"] else wanted
    for name in wanted:
        if name not in available:
            known = name in [str(tracker) for tracker in LoggerType]
            what = "is not installed" if known else "is unknown to Accelerate"
            raise InputError(f"the tracker {name} {what}; available: {', '.join([*available, 'none'])}", "tracker")
    accelerator = start_processes(
        args.threads,
        args.mixed_precision,
        log_with=wanted or None,
        project_dir=str(run / "trackers"),
        dynamo_backend="inductor" if args.compile else None,
    )
    if str(accelerator.distributed_type).endswith(("FSDP", "DEEPSPEED", "MEGATRON_LM")):
        raise InputError(
            "sharding does not help models of at most 76 million parameters; choose multi-GPU without it in "
            "`accelerate config`"
        )
    args.mixed_precision = accelerator.mixed_precision
    return accelerator


def train(
    args: argparse.Namespace,
    run: Path,
    recipe: dict[str, Any],
    command: str,
    check: Callable[[str], str],
    accelerator: Accelerator,
) -> int:
    """Train a classifier, and write the best epoch as a model folder.

    Args:
        args: The settings, by the names of the options of `finetune`.
        run: Folder of the run's checkpoints and trackers.
        recipe: The settings, for recipe.toml.
        command: The command that reproduces the run, for the card.
        check: Returns the command that repeats the evaluation of the model on a split of the data.
        accelerator: The processes.

    Returns:
        0, or 128 + the number of the signal that stopped the training.

    Raises:
        InputError: A setting, the data, the model or a checkpoint is invalid, or the training diverged.
    """
    Optimization.of(vars(args))  # checks names before the data is read
    checkpoints = Checkpoints(run / "checkpoints", args.keep)
    path, saved = prepare_run(args, checkpoints, accelerator)

    data = open_data(args, accelerator)
    network = build_network(args, data.names, accelerator)
    samples = training_samples(network.model, data.names, augmentation_of(args), args.crop_padding, data.train.read)
    settings = settings_for(args, data, accelerator)
    create_optimizer(args, network.model, settings)  # raises timm's errors before all images are read
    plan = plan_of(args, data, settings, accelerator)
    if saved is not None:
        check_checkpoint(saved, path, args)
        check_plan(saved["plan"], plan, args, accelerator)
    left_out = leave_out_unreadable(args, data, saved, accelerator)
    settings = settings_for(args, data, accelerator)  # fewer steps, if images are skipped
    loader = create_loader(args, data, samples, settings, accelerator)

    optimizer, scheduler = create_optimizer(args, network.model, settings)
    state = State.create(network.model, optimizer, scheduler, accelerator, network.average)
    if saved is not None:
        resume(state, saved, path, args.output, settings, accelerator)
        del saved  # frees a second copy of the weights
    origin, config = network.origin, network.model.pretrained_cfg
    report = Report(args.output, run, recipe, data, config, origin, hardware(accelerator), command, state.metrics)
    objective = Classification(args, data, network, state, loader, plan, left_out, report, accelerator)
    announce(objective, settings)
    loop = Loop(objective, state, settings, checkpoints, accelerator)
    stopped = loop.run()
    if not stopped:
        finish(objective, check)
        if args.profile:
            accelerator.print(throughput_of(loop, loader.num_workers))
        wait_for_all()
        accelerator.end_training()
    return stopped


def prepare_run(args: argparse.Namespace, checkpoints: Checkpoints, accelerator: Accelerator) -> tuple[Path, Any]:
    """Prepare the run's folders; return the last checkpoint if the run is resumed, see `load_newest`."""
    is_main = accelerator.is_main_process
    all_or_none(lambda: checkpoints.prepare(args.output, args.resume, args.overwrite) if is_main else None)
    return load_newest(checkpoints, accelerator) if args.resume else (checkpoints.folder, None)


def open_data(args: argparse.Namespace, accelerator: Accelerator) -> TrainingData:
    """Open the training and evaluation images."""
    return open_training_data(
        args.data,
        accelerator,
        args.train_split,
        args.eval_split,
        fraction=args.hold_out,
        seed=args.seed,
        streaming=args.streaming,
        label_column=args.label_column,
        num_classes=args.num_classes,
    )


def settings_for(args: argparse.Namespace, data: TrainingData, accelerator: Accelerator) -> Settings:
    """Return the settings of the training loop."""
    step_images = args.batch_size * args.accumulate * accelerator.num_processes
    return Settings(
        epochs=args.epochs,
        steps=steps_of(data, step_images, args.steps_per_epoch),
        step_images=step_images,
        accumulate=args.accumulate,
        clip_grad=args.clip_grad,
        patience=args.patience,
        save_minutes=args.save_minutes,
    )


def learning_rate(args: argparse.Namespace, settings: Settings) -> float:
    """Return the maximum learning rate, scaled to the global batch size."""
    return scaled_lr(args.lr, args.opt, settings.step_images, args.lr_base_size)


def create_optimizer(args: argparse.Namespace, model: nn.Module, settings: Settings) -> tuple[Any, Any]:
    """Return optimizer and schedule, see `Optimization.create`."""
    optimization = Optimization.of({**vars(args), "lr": learning_rate(args, settings)})
    return optimization.create(model, settings.steps)


def augmentation_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of timm's `create_transform`."""
    names = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment")
    return {**{name: getattr(args, name) for name in names}, "re_prob": args.reprob}


def create_loader(
    args: argparse.Namespace, data: TrainingData, samples: Samples, settings: Settings, accelerator: Accelerator
) -> DataLoader:
    """Return the loader of this process's training batches."""
    return training_loader(
        data,
        samples,
        accelerator,
        args.batch_size,
        workers_of(args.workers, accelerator.device),
        args.seed,
        batches=settings.steps * args.accumulate,
        balance=args.balance == "sampling",
        repeats=args.repeats,
        buffer=args.shuffle_buffer,
    )


def plan_of(
    args: argparse.Namespace, data: TrainingData, settings: Settings, accelerator: Accelerator
) -> dict[str, Any]:
    """Return the settings that must not change when the run is resumed."""
    plan = {
        "model": args.model,
        "classes": data.names,
        "images": data.train.num_rows,
        "images a step": settings.step_images,
        "precision": accelerator.mixed_precision,
    }
    if args.streaming:  # the order of the images depends on these
        workers = workers_of(args.workers, accelerator.device)
        plan |= {"processes": accelerator.num_processes, "workers": workers, "batch": args.batch_size}
    return plan


def leave_out_unreadable(
    args: argparse.Namespace, data: TrainingData, saved: Mapping[str, Any] | None, accelerator: Accelerator
) -> list[int]:
    """Exclude training images that cannot be decoded: those in the checkpoint, or otherwise those found now.

    Returns:
        Their indices.

    Raises:
        InputError: Images cannot be decoded and `skip_corrupt` is false, or too few remain.
    """
    checked = args.check and not args.streaming
    left_out: list[int] = []
    if saved is not None:
        left_out = saved["left_out"]
        data.unreadable = sorted(saved.get("unreadable", []))  # found during training
    elif checked:
        workers = workers_of(args.workers, accelerator.device)
        left_out = corrupt_images(data, accelerator, workers, args.skip_corrupt)
    if args.skip_corrupt and not checked and not args.streaming:
        check_readable(data.valid)
    if left_out:
        data.leave_out(left_out)
    return left_out


def check_checkpoint(saved: Any, path: Path, args: argparse.Namespace) -> None:
    """Check that a checkpoint, which may be any file, contains what is needed to resume this run.

    Raises:
        InputError: A field is missing or invalid.
    """

    def is_plan(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and all(isinstance(value.get(key), str) for key in ("model", "precision"))
            and isinstance(value.get("classes"), list)
            and all(isinstance(name, str) for name in value["classes"])
            and (value.get("images", "") is None or is_count(value.get("images")))
            and is_count(value.get("images a step"))
        )

    def are_indices(value: Any) -> bool:
        return isinstance(value, list) and all(map(is_count, value))

    kinds = ("", "ema_") if args.ema else ("",)
    figures: dict[str, Fits] = {f"{kind}{top}": lambda x: is_number(x, 0) for kind in kinds for top in ("top1", "top5")}
    figures |= {"step": is_count, "lr": is_number, "train_loss": is_number, "peak_memory_mb": is_count}
    figures["images_per_second"] = lambda x: x is None or is_number(x, 0)
    fields = checkpoint_fields(figures, bool(args.ema))
    are_rows = fields["metrics"]
    fields |= {
        "plan": is_plan,
        "left_out": are_indices,
        "metrics": lambda x: are_rows(x) and all(len(row) == len(figures) + 1 for row in x),
    }
    if isinstance(saved, dict) and "unreadable" in saved:  # missing from checkpoints of earlier versions
        fields["unreadable"] = are_indices
    check_state(saved, path, fields)


def check_plan(
    before: Mapping[str, Any], now: Mapping[str, Any], args: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Check that a run can be resumed with the current plan.

    Raises:
        InputError: A setting differs.
    """

    def differ(what: str, then: object, found: object, hint: str = "", *parameters: str) -> InputError:
        return InputError(f"the run in {args.output} was started with {what} {then}, not {found}{hint}", *parameters)

    if before["model"] != now["model"]:
        raise differ("the model", before["model"], now["model"])
    if len(before["classes"]) != len(now["classes"]):
        raise differ("a number of classes of", len(before["classes"]), len(now["classes"]))
    if before["classes"] != now["classes"]:
        changed = next(pair for pair in zip(before["classes"], now["classes"], strict=True) if pair[0] != pair[1])
        raise differ("the class", *changed)
    if before["precision"] != now["precision"]:
        raise differ("the precision", before["precision"], now["precision"])
    if before["images"] != now["images"]:
        raise differ("a number of images of", before["images"], now["images"])
    if (then := before["images a step"]) != now["images a step"]:
        size = then / accelerator.num_processes / args.accumulate
        hint = f"; use batches of {size:g}"
        raise differ("images per step:", then, now["images a step"], hint, "batch_size")
    if before != now:
        warn(
            "processes, workers or batches have changed, so the rest of this epoch's stream has a different order: "
            "some images are repeated, others are missing"
        )


def announce(objective: Classification, settings: Settings) -> None:
    """Start trackers, and write and print the settings."""
    args, data, state = objective.args, objective.data, objective.state
    report, accelerator = objective.report, objective.accelerator
    if accelerator.log_with:
        plain = {key: value for key, value in report.settings.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers(args.output.absolute().name, config=plain)
    # On each machine, because they may not share the folder.
    all_or_none(lambda: report.start() if accelerator.is_local_main_process else None)
    if not accelerator.is_main_process:
        return
    parameters = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    start_from = "pretrained" if args.pretrained else "random weights"
    held_out = f", {args.hold_out:g} of each class held out" * ("/held-out-" in data.valid.split)
    print(
        f"model: {args.model}, {start_from}, {parameters:,} parameters, {trained:,} of them trained",
        f"data: {args.data}, {len(data.names)} classes, {data.num_images or 'some'} images of {data.train.split}; "
        f"evaluated on {data.valid.num_rows or 'some'} of {data.valid.split}{held_out}",
        f"run: recipe {args.recipe or 'as before'}, {args.epochs} epochs of {settings.steps} steps of "
        f"{settings.step_images} images, {args.opt}, learning rate {learning_rate(args, settings):g}, {args.sched}; "
        f"{report.hardware}, {accelerator.mixed_precision.replace('no', 'float32')}",
        *([f"resumes after step {state.done} of {settings.total}"] if state.done else []),
        sep="\n",
        flush=True,
    )


def throughput_of(loop: Loop, workers: int) -> Throughput:
    """Measure data loading and training steps alone; changes the weights; the best ones are in the model folder.

    Args:
        loop: The loop, after its last step.
        workers: Data-loading workers per process.
    """
    accumulate = loop.settings.accumulate

    def steps() -> Iterator[list[Any]]:
        """Yield the batches of each step."""
        batches = loop.objective.batches(0, 0)
        while group := list(itertools.islice(batches, accumulate)):
            yield group

    loop.objective.train_mode()
    return measure(
        steps,
        lambda group: sum(len(images) for images, _ in group),
        lambda group: loop.step(itertools.cycle(group)),
        loop.state.metrics[-1]["images_per_second"],
        workers,
    )


def finish(objective: Classification, check: Callable[[str], str]) -> None:
    """Load the best model from its folder and evaluate it in float32; write its plots and card.

    Args:
        objective: What was trained.
        check: Returns the command that repeats the evaluation of the model on a split.
    """
    args, report, accelerator = objective.args, objective.report, objective.accelerator
    best = build_model(args, objective.data.names, pretrained=False)
    best = best.to(accelerator.device, memory_format=torch.channels_last)
    load_everywhere(best, args.output, accelerator)
    mistakes = Mistakes(len(objective.data.names))
    counts = objective.measure(best, desc="evaluate", observe=mistakes, forward=best)  # in float32
    mistakes.gather(accelerator)
    if accelerator.is_main_process:
        report.finish(mistakes, objective.state.rates, counts)
        _, epoch, kind = best_of(report.metrics)
        print(
            f"best in epoch {epoch}{', by EMA' if kind else ''}: top-1 {counts.percent(counts.top1):.3f}; "
            f"the model is in {args.output}"
        )
        print(f"to reproduce: {check(report.data.valid.split)}")


def load_everywhere(model: nn.Module, folder: Path, accelerator: Accelerator) -> None:
    """Load the weights of a model folder in all processes; only the main one reads the folder."""
    if accelerator.is_main_process:
        model.load_state_dict(load_file(folder / WEIGHTS))
    for tensor in model.state_dict().values():
        broadcast(tensor)
