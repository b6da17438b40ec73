"""Train or fine-tune a model on labelled images, and write the best one as a model folder.

Usage: accelerate launch scripts/finetune.py [--model NAME] [--pretrained] [--data SRC] [--recipe NAME]

With neither --model nor --data it trains the small model that the repository ships, on the digits
that the repository ships, as hub/models/res2net_tiny.digits was made.

A recipe is a file of scripts/recipes/ (or the path of one) with values for any of the settings
below; what stands on the command line goes before it. The folder that is written holds the model
of the epoch with the best top-1 on the evaluation split (of several, the last), its card with all
settings, metrics.csv and learning_curve.png; timm reads it as local-dir:DIR.

Exit codes: 0 done; 2 bad input. `accelerate launch` turns every failure into 1.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import shlex
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from huggingface_hub import ModelCard

    from res2net_zoo.catalog import Accuracy
    from res2net_zoo.data import Source

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_DATA = ROOT / "hub" / "datasets" / "digits"
RECIPES = ROOT / "scripts" / "recipes"


def within(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return an argument type: an int or float from `low` to `high`."""

    def parse(text: str) -> float:
        if not low <= (number := kind(text)) <= high:  # so that not-a-number is refused as well
            raise argparse.ArgumentTypeError(f"{text} is not {low} or more" + (f", up to {high}" * (high < math.inf)))
        return number

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that a wrong argument is told in one line
    )
    add = parser.add_argument
    # What to train, and on what
    add("--model", default="res2net_tiny", help="what timm.create_model takes (%(default)s)")
    add("--pretrained", action="store_true", help="start from the model's published weights")
    add("--data", default=os.path.relpath(SHIPPED_DATA), help="as for validate.py (%(default)s)")
    add("--train-split", default="train", help="(%(default)s)")
    add("--eval-split", help="default validation, else test")
    add("--label-column", help="column of the labels, where it is not plain")
    add("--output", type=Path, default=Path("outputs/finetune"), help="model folder to write (%(default)s)")
    add("--recipe", help="name in scripts/recipes, or a .toml file (digits where neither --model nor --data is given)")
    add("--license", help="licence of the result, for its card (default that of the pretrained weights)")
    # How long, and how much at once
    add("--epochs", type=within(int, 1), default=20, help="(%(default)s)")
    add("--batch-size", type=within(int, 1), default=64, help="images a step and process (%(default)s)")
    add("--seed", type=within(int, 0, 2**31), default=0, help="(%(default)s)")
    add("--workers", type=within(int, 0), help="loader processes for each process (default by the machine)")
    add("--threads", type=within(int, 1), help="CPU threads for each process (default its share of the cores)")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="default as `accelerate config` says, else no")
    # Optimizer and schedule, by timm's names
    add("--opt", default="adamw", help="(%(default)s)")
    add("--lr", type=within(float, 0), default=5e-4, help="highest learning rate (%(default)s)")
    add("--momentum", type=within(float, 0, 1), default=0.9, help="(%(default)s)")
    add("--weight-decay", type=within(float, 0), default=0.05, help="(%(default)s)")
    add("--sched", default="cosine", help="(%(default)s)")
    add("--warmup-epochs", type=within(int, 0), default=1, help="(%(default)s)")
    add("--min-lr", type=within(float, 0), default=0.0, help="learning rate at the end (%(default)s)")
    add("--clip-grad", type=within(float, 0), help="largest norm of the gradient")
    # Regularization
    add("--smoothing", type=within(float, 0, 1), default=0.1, help="label smoothing (%(default)s)")
    add("--drop-path", type=within(float, 0, 0.99), default=0.0, help="stochastic depth (%(default)s)")
    # Augmentation, by timm's names
    add(
        "--scale",
        type=within(float, 0.01, 1),
        nargs=2,
        default=(0.35, 1.0),
        help="share of the image that a random crop keeps",
    )
    add("--ratio", type=within(float, 0.1, 10), nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of a random crop")
    add("--hflip", type=within(float, 0, 1), default=0.5, help="probability of a horizontal flip (%(default)s)")
    add("--color-jitter", type=within(float, 0), default=0.0, help="(%(default)s)")
    add("--auto-augment", help="such as rand-m9-mstd0.5")
    add("--reprob", type=within(float, 0, 1), default=0.0, help="probability of random erasing (%(default)s)")
    add("--mixup", type=within(float, 0), default=0.0, help="mixup alpha (%(default)s)")
    add("--cutmix", type=within(float, 0), default=0.0, help="CutMix alpha (%(default)s)")
    return parser


def parse_args() -> argparse.Namespace:
    """Parse the command line over the recipe's settings over the defaults."""
    parser = build_parser()
    args = parser.parse_args()
    if args.recipe is None and args.model == parser.get_default("model") and args.data == parser.get_default("data"):
        args.recipe = "digits"
    if args.recipe is not None:
        path = Path(args.recipe) if args.recipe.endswith(".toml") else RECIPES / f"{args.recipe}.toml"
        try:
            settings = tomllib.loads(path.read_text())
        except OSError:
            parser.error(
                f"no recipe {args.recipe}; there are {', '.join(sorted(p.stem for p in RECIPES.glob('*.toml')))}"
            )
        except ValueError as error:
            parser.error(f"recipe {path} is no TOML: {error}")
        if unknown := sorted(settings.keys() - vars(args).keys()):
            parser.error(f"recipe {path} sets {', '.join(unknown)}, which is no setting; --help lists them")
        # Written as options before the real ones, a recipe's values are checked just as those are.
        words = []
        for key, value in settings.items():
            if value is not False:
                words.append(f"--{key.replace('_', '-')}")
                words += map(str, value if isinstance(value, list) else [] if value is True else [value])
        args = parser.parse_args([*words, "--recipe", args.recipe, *sys.argv[1:]])
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"mixup and CutMix pair the images of a batch; --batch-size {args.batch_size} is odd")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; name a folder")
    if args.output.exists() and not (args.output / "config.json").is_file() and any(args.output.iterdir()):
        parser.error(f"--output {args.output} holds other things than a model; name another folder")
    return args


def main(args: argparse.Namespace) -> int:
    import torch
    from accelerate.utils import set_seed
    from timm.data import Mixup, create_transform, resolve_model_data_config
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import distribute_bn
    from torch.utils.data import DataLoader

    from res2net_zoo.catalog import Accuracy
    from res2net_zoo.data import MapSamples, Samples, open_source
    from res2net_zoo.evaluate import collate, evaluate
    from res2net_zoo.folder import write_model_folder
    from res2net_zoo.labels import match_classes
    from res2net_zoo.pretrained import create_model
    from res2net_zoo.program import (
        InputError,
        all_or_none,
        check_can_make,
        default_workers,
        main_first,
        progress_bar,
        start_processes,
    )

    accelerator = start_processes(args.threads, args.mixed_precision)
    set_seed(args.seed)
    if accelerator.is_main_process:
        check_can_make(args.output)

    # Data: labels and preprocessing as in validate.py, with timm's augmentation for training.
    def open_split(split: str | None) -> "Source":
        return main_first(accelerator, lambda: open_source(args.data, split, label_column=args.label_column))

    train, valid = open_split(args.train_split), open_split(args.eval_split)
    if train.split == valid.split:
        raise InputError(
            f"training and evaluation would both be on {train.split} of {args.data}; "
            "name another split with --train-split or --eval-split"
        )
    names = train.class_names or [str(i) for i in range(1 + max(label or 0 for label in train.rows["label"]))]
    if strange := sorted(set(valid.class_names or ()) - set(names)):
        raise InputError(
            f"{args.data} has classes in {valid.split} that {train.split} has not: {', '.join(strange[:5])}"
        )
    batch = args.batch_size * accelerator.num_processes
    if len(train.rows) < batch:
        raise InputError(f"{args.data} has {len(train.rows)} images to train on, less than a batch of {batch}")
    options = {"drop_path_rate": args.drop_path} if args.drop_path else {}
    model: Any = all_or_none(lambda: create_model(args.model, args.pretrained, num_classes=len(names), **options))
    base_model = ((args.pretrained and model.pretrained_cfg.get("hf_hub_id")) or "").partition("@")[0] or None
    model.pretrained_cfg["tag"] = None  # what comes out is no longer that checkpoint
    set_seed(args.seed, device_specific=True)  # the same weights in all processes, but augmentation of their own
    config = resolve_model_data_config(model)
    try:
        transform = create_transform(
            **config,
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.auto_augment,
            re_prob=args.reprob,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"timm knows no such augmentation: --auto-augment {args.auto_augment} ({error!r})") from error
    samples = Samples(
        transform, "L" if config["input_size"][0] == 1 else "RGB", match_classes(names, len(names), names).targets
    )
    workers = default_workers(accelerator.device) if args.workers is None else args.workers
    loader = DataLoader(
        MapSamples(train.rows, samples),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
    )

    # Optimizer, schedule and loss are timm's.
    try:
        optimizer = create_optimizer_v2(
            model, args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum
        )
        steps = len(loader) // accelerator.num_processes
        scheduler, _ = create_scheduler_v2(
            optimizer,
            args.sched,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            min_lr=args.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except (AssertionError, ValueError, RuntimeError) as error:
        raise InputError(f"timm makes no optimizer {args.opt} with schedule {args.sched}: {error}") from error
    mixup = None
    loss_fn: torch.nn.Module = torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=len(names))
        loss_fn = SoftTargetCrossEntropy()
    model = model.to(memory_format=torch.channels_last)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    bare = accelerator.unwrap_model(model)

    metrics: list[dict[str, float]] = []
    best = -1
    for epoch in range(args.epochs):
        model.train()
        total = torch.zeros((), device=accelerator.device)
        start = time.perf_counter()
        for step, (images, targets, bad) in enumerate(
            progress_bar(accelerator, loader, desc=f"epoch {epoch + 1}/{args.epochs}")
        ):
            for sample in bad:
                raise InputError(f"{sample.place}: {sample.fatal or f'corrupt ({sample.corrupt}); take it out'}")
            targets = targets[:, 0]
            if mixup is not None:
                images, targets = mixup(images, targets)
            with accelerator.autocast():
                logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = loss_fn(logits.float(), targets)
            accelerator.backward(loss)
            if args.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:  # --sched none
                scheduler.step_update(epoch * steps + step + 1)
            total += loss.detach()
        train_loss = accelerator.reduce(total, "mean").item() / steps
        seconds = time.perf_counter() - start
        if not math.isfinite(train_loss):
            raise InputError(f"the loss is {train_loss} in epoch {epoch + 1}; try a lower --lr or --clip-grad 1")

        if accelerator.num_processes > 1:
            distribute_bn(bare, accelerator.num_processes, reduce=True)  # each process has seen other batches
        counts = evaluate(bare, valid, match_classes(valid.class_names or names, len(names), names), accelerator)
        top1, top5 = counts.percent(counts.top1), counts.percent(counts.top5)
        metrics.append(
            {
                "epoch": epoch + 1,
                "lr": optimizer.param_groups[0]["lr"],
                "train_loss": round(train_loss, 5),
                "top1": top1,
                "top5": top5,
                "images_per_second": round(steps * batch / seconds, 1),
            }
        )
        if accelerator.is_main_process:
            print(f"epoch {epoch + 1:3}: loss {train_loss:.4f}, top-1 {top1:.3f}, top-5 {top5:.3f}", flush=True)
            if counts.top1 >= best:
                best = counts.top1
                accuracy = Accuracy(
                    dataset=valid.name, split=valid.split, top1=top1, top5=top5, source="scripts/finetune.py"
                )
                card = write_card(args, bare, base_model, accuracy, epoch + 1, counts.samples, accelerator)
                write_model_folder(args.output, bare, card, names)
            write_metrics(args.output, metrics)
    if accelerator.is_main_process:
        draw_learning_curve(args.output, metrics)
        print(f"best top-1 {max(m['top1'] for m in metrics):.3f}; the model is in {args.output}")
    accelerator.end_training()
    return 0


def write_card(
    args: argparse.Namespace,
    model: "torch.nn.Module",
    base_model: str | None,
    accuracy: "Accuracy",
    epoch: int,
    samples: int,
    accelerator: "Accelerator",
) -> "ModelCard":
    """Write the model's card: what it is, how to use it, what made it, how good it is."""
    import timm
    import torch

    from res2net_zoo.card import model_card
    from res2net_zoo.program import markdown_table

    processes = accelerator.num_processes
    launch = f"--multi_gpu --num_processes {processes} " if processes > 1 else ""
    cpu = "ACCELERATE_USE_CPU=true " if launch and accelerator.device.type == "cpu" else ""
    command = f"{cpu}accelerate launch {launch}scripts/finetune.py {shlex.join(sys.argv[1:])}".strip()
    where = f"{processes} {accelerator.device.type} process{'es' if processes > 1 else ''}"
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "license")}
    cfg: Any = model.pretrained_cfg
    picture = "\n![Learning curve](learning_curve.png)\n" if importlib.util.find_spec("matplotlib") else ""
    parameters = sum(p.numel() for p in model.parameters())
    started = "its published weights" if args.pretrained else "random weights"
    text = f"""
# {args.output.resolve().name}

{cfg["architecture"]} with {model.num_classes} classes and {parameters:,} parameters, trained from {started} on
`{args.data}` by the Res2Net Zoo. Res2Net: Gao et al., TPAMI 2021, arXiv 1904.01169.

## Use

In the folder that holds this one:

```python
import timm
import res2net_zoo  # registers the model with timm

model = timm.create_model("local-dir:{args.output.name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Accuracy

Top-1 {accuracy.top1:.3f}, top-5 {accuracy.top5:.3f} percent on the {samples} images of the split `{accuracy.split}`,
which training never saw. This is epoch {epoch} of {args.epochs}, the best on that same split (of several, the last), so
expect a little less on new images. `python scripts/validate.py --check` measures it again.
{picture}
## Training

Made by

```
{command}
```

with torch {torch.__version__.split("+")[0]} and timm {timm.__version__}, on {where}, with these settings:

{markdown_table(("setting", "value"), [(key, json.dumps(value, default=str)) for key, value in settings.items()])}
"""
    license = args.license or (cfg.get("license") if args.pretrained else None)
    return model_card(args.output.resolve().name, text, license, [accuracy], base_model=base_model)


def write_metrics(folder: Path, metrics: list[dict[str, float]]) -> None:
    """Write metrics.csv, a row an epoch."""
    from res2net_zoo.program import write_atomically

    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, metrics[0].keys())
            writer.writeheader()
            writer.writerows(metrics)

    write_atomically(folder / "metrics.csv", write)


def draw_learning_curve(folder: Path, metrics: list[dict[str, float]]) -> None:
    """Draw loss and accuracy over the epochs as learning_curve.png."""
    from res2net_zoo.program import write_atomically

    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no learning_curve.png: it takes matplotlib, pip install -e '.[train]'", file=sys.stderr)
        return
    epochs = [m["epoch"] for m in metrics]
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [m["train_loss"] for m in metrics], color="tab:blue")
    loss.set(title="Training loss", xlabel="epoch")
    for key, label, style in (("top1", "top-1", "-"), ("top5", "top-5", ":")):
        accuracy.plot(epochs, [m[key] for m in metrics], style, color="tab:orange", label=label)
    top1 = [m["top1"] for m in metrics]
    best = max(range(len(top1)), key=lambda i: (top1[i], i))
    accuracy.plot(epochs[best], top1[best], "o", color="tab:orange")
    accuracy.annotate(f"{top1[best]:.2f}", (epochs[best], top1[best]), (0, -14), textcoords="offset points", ha="right")
    # From a little below the median: the first epochs would squeeze everything that matters.
    accuracy.set(title="Accuracy in evaluation (%)", xlabel="epoch")
    accuracy.set_ylim(max(0, 2 * sorted(top1)[len(top1) // 2] - 101), 100.5)
    accuracy.legend(loc="lower right")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    write_atomically(folder / "learning_curve.png", lambda path: figure.savefig(path, dpi=120))


if __name__ == "__main__":
    arguments = parse_args()

    from res2net_zoo.program import run

    sys.exit(run(lambda: main(arguments)))
