"""Train or fine-tune a model on labelled images, and write the best one as a model folder.

Usage: accelerate launch scripts/finetune.py [--model NAME] [--pretrained] [--data SRC] [--recipe NAME]
                                             [--output DIR] [--resume]

With neither --model nor --data it trains the small model that the repository ships, on the digits
that the repository ships, as hub/models/res2net_tiny.digits was made.

A recipe is a file of scripts/recipes/ (or the path of one) with values for any of the settings
below; what stands on the command line goes before it. DIR holds the best model by its top-1 on the
evaluation split (of several, the last), its card, recipe.toml with every setting, metrics.csv and
pictures; timm reads it as local-dir:DIR. DIR.run holds what a run needs to go on (checkpoints) and
to be watched (trackers). --resume goes on from the last checkpoint, or starts where there is none.

SIGTERM and Ctrl-C save a checkpoint and end the run; docs/training.md says what reaches it under
`accelerate launch`, and how to train on several machines.

Exit codes: 0 done; 2 bad input; 130 and 143 stopped by Ctrl-C or SIGTERM. `accelerate launch` turns
every failure into 1.
"""

import argparse
import contextlib
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import (
    RECIPES,
    SHIPPED_DATA,
    Parser,
    add_machine,
    add_optimizer,
    add_run_folder,
    command_of,
    frozen_stages,
    parse_run,
    run_folder,
    settings_of,
    within,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


def build_parser() -> Parser:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what to train, and on what").add_argument
    add("--model", default="res2net_tiny", help="what timm.create_model takes (%(default)s)")
    add("--pretrained", action=flag, default=False, help="start from the model's published weights")
    add("--data", default=os.path.relpath(SHIPPED_DATA), help="as for validate.py (%(default)s)")
    add("--train-split", default="train", help="(%(default)s)")
    add("--eval-split", help="default validation, else test, else images held out of the training split")
    add("--hold-out", type=within(float, 1e-4, 0.9), default=0.2, help="share of each class to hold out (%(default)s)")
    add("--label-column", help="column of the labels, where it is not plain")
    add("--num-classes", type=within(int, 2), help="where a stream does not say")
    add("--streaming", action=flag, default=False, help="read the images as they come, caching nothing")
    add("--shuffle-buffer", type=within(int, 1), default=1000, help="images of a stream to shuffle among (%(default)s)")
    add("--steps-per-epoch", type=within(int, 1), help="default all images once; a stream may not say how many it has")
    add("--check", action=flag, default=True, help="decode every image once before training starts")
    add("--skip-corrupt", action=flag, default=False, help="leave out images that cannot be decoded")
    add("--recipe", help="name in scripts/recipes or a .toml file (finetune with --pretrained, else scratch)")
    add("--license", help="licence of the result, for its card (default that of the pretrained weights)")

    add = parser.add_argument_group("files").add_argument
    add_run_folder(add, "outputs/finetune")
    add("--tracker", nargs="+", help="by Accelerate's names, or none (tensorboard where it is installed)")

    add = parser.add_argument_group("how long, and how much at once").add_argument
    add("--epochs", type=within(int, 1), default=20, help="(%(default)s)")
    add("--patience", type=within(int, 0), help="epochs without a better top-1 after which to stop; 0 for never")
    add("--batch-size", type=within(int, 1), default=64, help="images a batch and process (%(default)s)")
    add("--accumulate", type=within(int, 1), default=1, help="batches a step (%(default)s)")
    add("--seed", type=within(int, 0, 2**31), default=0, help="(%(default)s)")
    add("--deterministic", action=flag, default=False, help="only operations that give the same bits again, on GPUs")
    add_machine(add)
    add("--compile", action=flag, default=False, help="torch.compile the model")
    add("--channels-last", action=flag, default=True, help="memory format; the faster one nearly everywhere")
    add("--grad-checkpointing", action=flag, default=False, help="less memory for more time")
    add("--sync-bn", action=flag, default=False, help="BatchNorm over the images of all processes, on GPUs")

    add = parser.add_argument_group("optimizer and schedule, by timm's names").add_argument
    add_optimizer(add, weight_decay=0.05, warmup_epochs=1)
    add("--lr-base-size", type=within(int, 1), help="images a step that --lr is for; it is scaled to those there are")
    add("--decay-all", action=flag, default=False, help="weight decay of biases and BatchNorm as well")
    add("--layer-decay", type=within(float, 0, 1), help="factor of the learning rate from each layer to the one before")

    add = parser.add_argument_group("the model in training").add_argument
    add(
        "--freeze",
        type=frozen_stages,
        default="0",
        help="stages, the stem being the first; all but the classifier: all",
    )
    add("--freeze-bn", action=flag, default=False, help="keep the statistics of every BatchNorm")
    add("--drop", type=within(float, 0, 0.99), default=0.0, help="dropout before the classifier (%(default)s)")
    add("--drop-path", type=within(float, 0, 0.99), default=0.0, help="stochastic depth (%(default)s)")
    add("--ema", type=within(float, 0, 1), help="decay of a moving average of the weights, such as 0.9998; 0 for none")
    add("--img-size", type=within(int, 8), help="pixels, where not the model's own size")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=("ce", "bce"), default="ce", help="cross entropy, or binary for each class (%(default)s)")
    add("--bce-threshold", type=within(float, 0, 1), help="share of a mixed target that counts as all of it, for bce")
    add("--smoothing", type=within(float, 0, 0.99), default=0.1, help="label smoothing (%(default)s)")
    add(
        "--balance",
        choices=("no", "loss", "sampling"),
        default="no",
        help="have rare classes count the same (%(default)s)",
    )
    add("--teacher", help="model to learn from, what timm.create_model takes; its weights are loaded")
    add(
        "--task-weight",
        type=within(float, 0, 1),
        default=0.5,
        help="of the labels; the teacher has the rest (%(default)s)",
    )
    add("--temperature", type=within(float, 0.01), default=1.0, help="of the teacher's answers (%(default)s)")

    add = parser.add_argument_group("augmentation, by timm's names").add_argument
    area = within(float, 0.01, 1)
    add("--scale", type=area, nargs=2, default=[0.35, 1.0], help="share of the image that a random crop keeps")
    add("--ratio", type=within(float, 0.1, 10), nargs=2, default=[0.75, 4 / 3], help="aspect ratio of a random crop")
    add(
        "--crop-padding",
        type=within(int, 0),
        default=0,
        help="pixels; a crop of the padded image in place of these two",
    )
    add("--hflip", type=within(float, 0, 1), default=0.5, help="probability of a horizontal flip (%(default)s)")
    add("--vflip", type=within(float, 0, 1), default=0.0, help="of a vertical one (%(default)s)")
    add("--color-jitter", type=within(float, 0), default=0.0, help="(%(default)s)")
    add("--auto-augment", help="such as rand-m9-mstd0.5, or none")
    add("--reprob", type=within(float, 0, 1), default=0.0, help="probability of random erasing (%(default)s)")
    add("--repeats", type=within(int, 1), default=1, help="augmentations of an image in a batch (%(default)s)")
    add("--mixup", type=within(float, 0), default=0.0, help="mixup alpha (%(default)s)")
    add("--cutmix", type=within(float, 0), default=0.0, help="CutMix alpha (%(default)s)")
    add("--mixup-prob", type=within(float, 0, 1), default=1.0, help="of doing either to a batch (%(default)s)")
    return parser


def parse_args() -> argparse.Namespace:
    """Parse the command line over the recipe's settings over the defaults."""
    parser = build_parser()

    def recipe_of(args: argparse.Namespace) -> str:
        shipped = args.model == parser.get_default("model") and args.data == parser.get_default("data")
        return args.recipe or ("digits" if shipped else "finetune" if args.pretrained else "scratch")

    args = parse_run(parser, recipe_of, RECIPES, ("clip_grad", "ema", "patience", "auto_augment"))
    if args.task_weight != parser.get_default("task_weight") and args.teacher is None:
        parser.error("this learns from a larger model; name it with --teacher")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"mixup and CutMix pair the images of a batch; --batch-size {args.batch_size} is odd")
    if args.balance == "loss" and args.loss == "bce":
        parser.error("--balance loss weighs classes in --loss ce; with bce, --balance sampling does it")
    if args.streaming and args.balance != "no":
        parser.error(f"--balance {args.balance} needs to know all labels, which a stream does not tell")
    return args


def main(args: argparse.Namespace) -> int:
    from res2net_zoo.utils.files import locked_by_main

    accelerator = start(args, run_folder(args.output))
    with locked_by_main(args.output, accelerator):
        return train(args, accelerator)


def train(args: argparse.Namespace, accelerator: "Accelerator") -> int:
    """Train a model and write it; return the exit code."""
    import torch
    from accelerate.utils import gather_object, set_seed
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
    from timm.task import ClassificationTask, LogitDistillationTask
    from timm.utils import ModelEmaV3, distribute_bn

    from res2net_zoo.data.labels import match_classes
    from res2net_zoo.evaluation import NOT_FINITE, evaluate
    from res2net_zoo.training.checkpoints import Checkpoints, check_progress, restore, restore_optimizer, restoring
    from res2net_zoo.training.data import (
        batches,
        check_readable,
        corrupt_images,
        open_training_data,
        seed_of,
        steps_of,
        training_loader,
    )
    from res2net_zoo.training.report import Mistakes, Report, best_of, hardware
    from res2net_zoo.training.setup import (
        Criterion,
        Normalize,
        Optimization,
        balanced,
        create_mixup,
        freeze,
        highest_rate,
        scaled_lr,
        training_samples,
        try_out,
    )
    from res2net_zoo.utils.console import progress_bar, warn
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import all_or_none, default_workers
    from res2net_zoo.utils.shutdown import Stop

    Optimization.of(vars(args))  # refuses unknown names before the data is read
    run = run_folder(args.output)
    args.mixed_precision = accelerator.mixed_precision  # which `accelerate launch` may have decided
    main_process, world = accelerator.is_main_process, accelerator.num_processes
    checkpoints = Checkpoints(run / "checkpoints", args.keep)
    all_or_none(lambda: checkpoints.take(args.output, args.resume, args.overwrite) if main_process else None)
    state = all_or_none(checkpoints.load) if args.resume else None

    data = open_training_data(
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
    names = data.names
    workers = default_workers(accelerator.device) if args.workers is None else args.workers
    set_seed(args.seed, deterministic=args.deterministic)  # the same random weights in all processes
    model = all_or_none(lambda: build_model(args, names, args.pretrained))
    origin = all_or_none(lambda: origin_of(args, model, main_process))
    all_or_none(lambda: try_out(model, args.batch_size))
    if args.sync_bn:
        model = synchronise_batch_norm(model, accelerator)
    frozen = freeze(model, args.freeze, args.freeze_bn)
    model = model.to(accelerator.device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    ema = None if args.ema is None else ModelEmaV3(model, args.ema, use_warmup=True)
    normalize = Normalize(model).to(accelerator.device)

    step_images = args.batch_size * args.accumulate * world
    steps = steps_of(data, step_images, args.steps_per_epoch)
    lr = scaled_lr(args.lr, args.opt, step_images, args.lr_base_size)
    optimization = Optimization.of({**vars(args), "lr": lr})
    optimizer, scheduler = optimization.create(model, steps)
    mixup = create_mixup(args.mixup, args.cutmix, args.mixup_prob, args.smoothing, len(names))
    augmentation = {
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "vflip": args.vflip,
        "color_jitter": args.color_jitter,
        "auto_augment": args.auto_augment,
        "re_prob": args.reprob,
    }
    samples = training_samples(model, names, augmentation, args.crop_padding, data.train.read)
    teacher = all_or_none(lambda: build_teacher(args, model, names, accelerator)) if args.teacher else None

    plan = {
        "model": args.model,
        "classes": names,
        "images": data.train.num_rows,
        "images a step": step_images,
        "precision": accelerator.mixed_precision,
    }
    if args.streaming:  # which image comes when depends on these
        plan |= {"processes": world, "workers": workers, "batch": args.batch_size}
    if state is not None:
        state = check_checkpoint(state, checkpoints.paths()[-1], args)
        check_plan(state["plan"], plan, args, accelerator)
    checked = args.check and not args.streaming
    left_out: list[int] = []
    if state is not None:
        left_out = state["left_out"]
    elif checked:
        left_out = corrupt_images(data, accelerator, workers, args.skip_corrupt)
    unreadable: set[Any] = set() if state is None else set(state.get("unreadable", []))  # found while training
    data.unreadable = sorted(unreadable)
    if args.skip_corrupt and not checked and not args.streaming:
        check_readable(data.valid)
    if left_out:
        data.leave_out(left_out)
        if (fewer := steps_of(data, step_images, args.steps_per_epoch)) != steps:
            steps = fewer
            optimizer, scheduler = optimization.create(model, steps)
    class_weights = balanced(data.counts) if args.balance == "loss" and data.counts else None
    criterion = Criterion(args.loss, args.smoothing, class_weights, args.bce_threshold)
    loader = training_loader(
        data,
        samples,
        accelerator,
        args.batch_size,
        workers,
        args.seed,
        batches=steps * args.accumulate,
        balance=args.balance == "sampling",
        repeats=args.repeats,
        buffer=args.shuffle_buffer,
    )

    bare = model
    second_order = getattr(optimizer, "is_second_order", False)
    accelerator.gradient_accumulation_steps = args.accumulate  # what `backward` divides by
    model, optimizer = accelerator.prepare(model, optimizer)
    task: Any = ClassificationTask(model, criterion, device=accelerator.device, verbose=False)
    if teacher is not None:
        task = LogitDistillationTask(
            bare,
            teacher,
            criterion,
            task_loss_weight=args.task_weight,
            temperature=args.temperature,
            device=accelerator.device,
            verbose=False,
        )
        task.trainable_module = model
    task.to(accelerator.device)

    done = 0  # optimizer steps
    metrics: list[dict[str, Any]] = []  # of each epoch that was evaluated
    rates: list[tuple[float, float]] = []
    losses = torch.zeros(2, device=accelerator.device)  # their sum in this epoch, and their number
    if state is not None:
        path = checkpoints.paths()[-1]
        restore(path, "model", bare, state["model"])
        restore_optimizer(path, optimizer, state["optimizer"])
        if ema is not None:
            restore(path, "ema", ema.module, state["ema"])
        if accelerator.scaler is not None:
            with restoring(path):
                accelerator.scaler.load_state_dict(state["scaler"])
        done, metrics, rates = state["done"], state["metrics"], state["rates"]
        check_progress(path, done, metrics, steps)
        if metrics and main_process and not (args.output / WEIGHTS).is_file():
            raise InputError(f"the best model so far is gone from {args.output}; begin again, in another --output")
        if len(metrics) >= args.epochs:
            raise InputError(
                f"the run in {args.output} has done {len(metrics)} epochs; --epochs {args.epochs} is no more"
            )
        if scheduler is not None:
            scheduler.step_update(done)  # a function of the step
        if main_process:
            losses += state["losses"].to(losses.device)
        del state

    report = Report(
        folder=args.output,
        run=run,
        settings=settings_of(args),
        data=data,
        config=bare.pretrained_cfg,
        origin=origin,
        hardware=hardware(accelerator),
        command=command_of("finetune.py", args, world, accelerator.device.type),
        metrics=metrics,
    )
    if accelerator.log_with:
        plain = {key: value for key, value in report.settings.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers(args.output.absolute().name, config=plain)
    total = args.epochs * steps
    if main_process:
        report.start()
        parameters = sum(p.numel() for p in bare.parameters())
        trained = sum(p.numel() for p in bare.parameters() if p.requires_grad)
        start_from = "pretrained" if args.pretrained else "random weights"
        held_out = f", {args.hold_out:g} of each class held out" * ("/held-out-" in data.valid.split)
        print(
            f"model: {args.model}, {start_from}, {parameters:,} parameters, {trained:,} of them trained",
            f"data: {args.data}, {len(names)} classes, {data.num_images or 'some'} images of {data.train.split}; "
            f"evaluated on {data.valid.num_rows or 'some'} of {data.valid.split}{held_out}",
            f"run: recipe {args.recipe or 'as before'}, {args.epochs} epochs of {steps} steps of {step_images} images, "
            f"{args.opt}, learning rate {lr:g}, {args.sched}; {report.hardware}, "
            f"{accelerator.mixed_precision.replace('no', 'float32')}",
            *([f"goes on after step {done} of {total}"] if done else []),
            sep="\n",
            flush=True,
        )

    def save() -> None:
        good = torch.stack([p.isfinite().all() for p in bare.parameters()]).all()
        check_loss(int(accelerator.gather(torch.where(good | (bad_step > 0), bad_step, done)).max()))
        everyone = accelerator.reduce(losses, "sum")  # a copy
        found = [] if args.streaming else sorted(set(gather_object(list(unreadable))))
        if not main_process:
            return
        checkpoints.save(
            done,
            {
                "plan": plan,
                "left_out": left_out,
                "unreadable": found,
                "done": done,
                "metrics": metrics,
                "rates": rates,
                "losses": everyone,
                "model": bare.state_dict(),
                "ema": None if ema is None else ema.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            },
        )

    def check_loss(bad_step: int) -> None:
        if bad_step:
            paths = checkpoints.paths()
            good = (
                f"--resume goes on from the last good checkpoint, {paths[-1]}"
                if paths
                else "there is no checkpoint yet"
            )
            raise InputError(
                f"the training has diverged: a loss or an output is no number, in step {bad_step} of {total}; {good}; "
                "a lower --lr or --clip-grad 1 may help"
            )

    classes = match_classes(data.valid.class_names or names, len(names), names)
    evaluation = dict(batch_size=args.batch_size, workers=workers, skip_corrupt=args.skip_corrupt)
    saved = time.monotonic()
    look = 1 if accelerator.device.type == "cpu" else 20  # steps between looks at the loss: a GPU has to wait for them
    bad_step, skipped = torch.zeros((), dtype=torch.long, device=accelerator.device), 0
    bar = progress_bar(accelerator, total=total, initial=done, desc="train", unit="step")
    with Stop(accelerator) as stop, bar as progress:
        for epoch in range(len(metrics), args.epochs):
            first = done - epoch * steps  # not 0 where a run goes on in the middle of an epoch
            task.train()
            for module in frozen:
                module.eval()
            loaded = batches(loader, epoch, first * args.accumulate, args.skip_corrupt, unreadable)
            started = time.perf_counter()
            for _ in range(first, steps):
                for part in range(args.accumulate):
                    images, targets = next(loaded)
                    images = normalize(images.to(accelerator.device, non_blocking=True))
                    targets = targets.to(accelerator.device, non_blocking=True)
                    # All that is random from here on follows from the place in the run, so that it can go on anywhere.
                    set_seed(seed_of(args.seed, 3, done, part, accelerator.process_index))
                    if mixup is not None and len(images) % 2 == 0:  # one may have been left out
                        images, targets = mixup(images, targets)
                    if args.channels_last:
                        images = images.contiguous(memory_format=torch.channels_last)
                    last = part == args.accumulate - 1
                    with contextlib.nullcontext() if last else accelerator.no_sync(model):
                        loss = task(images, targets)["loss"]
                        accelerator.backward(loss, create_graph=second_order)
                    losses[0] += loss.detach().nan_to_num(0, 0, 0)
                    losses[1] += 1
                    if accelerator.scaler is None:  # which leaves such steps out
                        bad_step = torch.where((bad_step == 0) & ~loss.detach().isfinite(), done + 1, bad_step)
                if args.clip_grad is not None:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if scheduler is not None:  # --sched none
                    scheduler.step_update(done)
                if ema is not None:
                    ema.update(bare, step=done)

                progress.update()
                rate = highest_rate(optimizer)
                if done % -(-total // 500) == 0:
                    rates.append((done / steps, rate))
                if accelerator.trackers and done % -(-steps // 20) == 0:
                    accelerator.log({"loss": loss.item(), "lr": rate}, step=done)
                skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
                bad = done if skipped > 20 else int(bad_step) if done % look == 0 else 0
                late = main_process and time.monotonic() - saved > 60 * args.save_minutes
                heard, bad, late = stop.agree(bad, late)
                check_loss(bad)
                if heard or late:
                    save()
                    saved = time.monotonic()
                if heard:
                    progress.close()
                    accelerator.print(
                        f"stopped by {signal.Signals(heard).name} after step {done} of {total}; go on with --resume",
                        flush=True,
                    )
                    accelerator.wait_for_everyone()
                    accelerator.end_training()
                    return 128 + heard
            seconds = time.perf_counter() - started

            loss_sum, number = accelerator.reduce(losses, "sum").tolist()
            averaged = None if ema is None else ema.module
            for weights in filter(None, (bare, averaged)):
                if world > 1:  # as each process has seen other batches; checkpoints have those of the first
                    distribute_bn(weights, world, reduce=False)
            save()  # before the evaluation, which a run that goes on from here does again
            saved = time.monotonic()
            unreadable |= set(gather_object(list(unreadable)))
            if len(unreadable) > len(data.unreadable) and main_process:
                warn(f"{len(unreadable)} images of {data.train.split} cannot be decoded and are left out")
            if args.streaming:
                unreadable.clear()  # which they are in another epoch is not known
            data.unreadable = sorted(unreadable)

            row: dict[str, Any] = {
                "epoch": epoch + 1,
                "step": done,
                "lr": highest_rate(optimizer),
                "train_loss": round(loss_sum / number, 5),
            }
            for kind, weights in (("", bare), ("ema_", averaged)):
                if weights is not None:
                    try:
                        counts = evaluate(weights, data.valid, classes, accelerator, **evaluation)
                    except InputError as error:
                        if NOT_FINITE in str(error):  # these weights are no good any more
                            if main_process:
                                checkpoints.paths()[-1].unlink()
                            check_loss(done)
                        raise
                    if counts.corrupt and epoch == 0 and not (kind or checked) and main_process:
                        warn(f"{len(counts.corrupt)} images of {data.valid.split} cannot be decoded and are left out")
                    row |= {f"{kind}top1": counts.percent(counts.top1), f"{kind}top5": counts.percent(counts.top5)}
                    report.samples = counts.samples
            row["images_per_second"] = round((steps - first) * step_images / seconds, 1) if first < steps else None
            row["peak_memory_mb"] = round(peak_memory(accelerator) / 2**20)
            metrics.append(row)
            losses.zero_()
            if main_process:
                shown = [
                    f"{key.replace('_', ' ').replace('top', 'top-')} {row[key]:.3f}" for key in row if "top" in key
                ]
                with progress.external_write_mode(sys.stdout):
                    print(f"epoch {epoch + 1:3}: loss {row['train_loss']:.4f}, {', '.join(shown)}", flush=True)
                report.epoch(bare, averaged)
            accelerator.log({key: value for key, value in row.items() if key not in ("step", "lr")}, step=done)
            if args.patience and epoch + 1 - best_of(metrics)[1] >= args.patience:
                accelerator.print(f"no better top-1 in {args.patience} epochs: stops")
                break

    # The best one once more, as others will load it: in float32, and for its mistakes.
    final = build_model(args, names, pretrained=False).to(accelerator.device, memory_format=torch.channels_last)
    load_everywhere(final, args.output, accelerator)
    mistakes = Mistakes(len(names))
    counts = evaluate(
        final, data.valid, classes, accelerator, **evaluation, desc="look at it", observe=mistakes, full_precision=True
    )
    mistakes.gather(accelerator)
    if main_process:
        report.finish(mistakes, rates, counts)
        _, best, kind = best_of(metrics)
        print(
            f"best in epoch {best}{', by EMA' if kind else ''}: top-1 {counts.percent(counts.top1):.3f}; "
            f"the model is in {args.output}"
        )
        print(f"measure it again: {report.check}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def start(args: argparse.Namespace, run: Path) -> "Accelerator":
    """Start Accelerate with the trackers that are asked for."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import start_processes

    there = [str(tracker) for tracker in get_available_trackers()]
    wanted = args.tracker or [name for name in ("tensorboard",) if name in there]
    wanted = [] if wanted == ["none"] else wanted
    for name in wanted:
        if name not in there:
            known = name in [str(tracker) for tracker in LoggerType]
            what = "is not installed" if known else "is none that Accelerate knows"
            raise InputError(f"--tracker {name} {what}; there are: {', '.join([*there, 'none'])}")
    accelerator = start_processes(
        args.threads,
        args.mixed_precision,
        log_with=wanted or None,
        project_dir=str(run / "trackers"),
        dynamo_backend="inductor" if args.compile else None,
    )
    if str(accelerator.distributed_type).endswith(("FSDP", "DEEPSPEED", "MEGATRON_LM")):
        raise InputError(
            "these models have 76 million parameters at most, which sharding does not help; choose multi-GPU without "
            "it in `accelerate config`"
        )
    return accelerator


def check_checkpoint(state: Any, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Find out whether a checkpoint, which may be any file, holds what this run needs to go on."""
    from res2net_zoo.training.checkpoints import are_finite, are_metrics, check_state, is_count, is_number

    def is_plan(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and all(isinstance(value.get(key), str) for key in ("model", "precision"))
            and isinstance(value.get("classes"), list)
            and all(isinstance(name, str) for name in value["classes"])
            and (value.get("images", "") is None or is_count(value.get("images")))
            and is_count(value.get("images a step"))
        )

    def is_rate(value: Any) -> bool:
        return value is None or is_number(value, 0)

    kinds = ("", "ema_") if args.ema else ("",)
    figures: dict[str, Any] = {f"{kind}{top}": lambda x: is_number(x, 0) for kind in kinds for top in ("top1", "top5")}
    figures |= {"step": is_count, "lr": is_number, "train_loss": is_number}
    figures |= {"images_per_second": is_rate, "peak_memory_mb": is_count}
    fields = {
        "plan": is_plan,
        "left_out": lambda x: isinstance(x, list) and all(map(is_count, x)),
        "metrics": lambda x: are_metrics(x, figures) and all(len(row) == len(figures) + 1 for row in x),
        "done": is_count,
        "rates": lambda x: isinstance(x, list) and all(len(pair) == 2 and all(map(is_number, pair)) for pair in x),
        "losses": lambda x: are_finite(x, 2),
        "model": lambda x: isinstance(x, dict),
        "ema": lambda x: isinstance(x, dict) if args.ema else True,
        "optimizer": lambda x: isinstance(x, dict),
        "scaler": lambda x: True,
    }
    if isinstance(state, dict) and "unreadable" in state:  # earlier versions did not count them
        fields["unreadable"] = fields["left_out"]
    return check_state(state, path, fields)


def check_plan(
    before: dict[str, Any], now: dict[str, Any], args: argparse.Namespace, accelerator: "Accelerator"
) -> None:
    """Find out whether a run can go on from a checkpoint with what it would be given now."""
    from res2net_zoo.utils.console import warn
    from res2net_zoo.utils.errors import InputError

    def differ(what: str, then: object, found: object, hint: str = "") -> InputError:
        return InputError(f"the run in {args.output} was started with {what} {then}, and has now {found}{hint}")

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
        raise differ("images a step:", then, now["images a step"], f"; --batch-size {size:g} makes them as many")
    if before != now and accelerator.is_main_process:
        warn(
            "with other processes, workers or batches than before, the rest of this epoch's stream comes in another "
            "order: some images come twice, others not at all"
        )


def synchronise_batch_norm(model: "nn.Module", accelerator: "Accelerator") -> "nn.Module":
    """Have BatchNorm take its statistics over all processes."""
    from timm.layers import convert_sync_batchnorm

    from res2net_zoo.utils.errors import InputError

    if accelerator.num_processes == 1:
        return model  # it does that by itself
    if accelerator.device.type == "cpu":
        raise InputError("torch synchronises BatchNorm on GPUs only; leave --sync-bn out")
    return convert_sync_batchnorm(model)


def build_model(args: argparse.Namespace, names: list[str], pretrained: bool) -> Any:
    """Make the model, with the weights to start from where it is pretrained."""
    from res2net_zoo.weights.pretrained import create_model

    options: dict[str, Any] = {"drop_path_rate": args.drop_path} if args.drop_path else {}
    if args.drop:
        options["drop_rate"] = args.drop
    model: Any = create_model(args.model, pretrained, num_classes=len(names), **options)
    if args.img_size:
        model.pretrained_cfg["input_size"] = (model.pretrained_cfg["input_size"][0], args.img_size, args.img_size)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def origin_of(args: argparse.Namespace, model: Any, is_main: bool) -> Any:
    """Return where the weights that are to be trained come from."""
    from res2net_zoo.weights import provenance

    before = provenance.of_model(args.model, model.pretrained_cfg, args.pretrained)
    after = before.after_training(
        provenance.shown(args.model) if args.pretrained else None,
        args.license,
        provenance.shown(args.teacher) if args.teacher else None,
    )
    if is_main:
        provenance.warn_of_other_license(before, after)
    return after


def build_teacher(args: argparse.Namespace, model: Any, names: list[str], accelerator: "Accelerator") -> "nn.Module":
    """Make the model to learn from."""
    import torch

    from res2net_zoo.data.labels import match_classes
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.weights.pretrained import create_model

    teacher: Any = create_model(args.teacher)
    labels = teacher.pretrained_cfg.get("label_names")
    same = teacher.num_classes == len(names) and not (labels and set(labels) != set(names))
    order = match_classes(names, len(names), labels).of_label if same else None
    if not same or order not in (None, list(range(len(names)))):
        raise InputError(
            f"--teacher {args.teacher} knows {teacher.num_classes} classes, and not these {len(names)} in this order; "
            "train it on them first"
        )
    if teacher.pretrained_cfg["input_size"][0] != model.pretrained_cfg["input_size"][0]:
        raise InputError(f"--teacher {args.teacher} takes images of other channels than {args.model}")
    teacher = teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def load_everywhere(model: "nn.Module", folder: Path, accelerator: "Accelerator") -> None:
    """Load a model folder's weights in all processes; only the main one need have the folder."""
    from accelerate.utils import broadcast
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
    from safetensors.torch import load_file

    if accelerator.is_main_process:
        model.load_state_dict(load_file(folder / WEIGHTS))
    for tensor in model.state_dict().values():
        broadcast(tensor)


def peak_memory(accelerator: "Accelerator") -> int:
    """Return the most memory that this process has had, on its device, in bytes."""
    import torch

    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    arguments = parse_args()

    from res2net_zoo.utils.console import run as run_program

    sys.exit(run_program(lambda: main(arguments)))
