"""Train or fine-tune a classifier, and save the best epoch as a model folder.

Usage: res2net-zoo finetune [--model NAME] [--pretrained] [--data SRC] [--recipe NAME] [--output DIR] [--resume]

With neither --model nor --data it trains the shipped model on the shipped digits.

A recipe is a file with values for any of the settings below; options on the command line override it. DIR contains
the model with the best top-1 on the evaluation split (the latest on ties), its card, recipe.toml with all settings,
metrics.csv and plots; timm loads it as local-dir:DIR. DIR.run contains the checkpoints and the trackers' files.
--resume continues from the last checkpoint, or starts a new run if there is none. On SIGTERM, Ctrl-C and SIGHUP
(from a closed terminal), the run saves a checkpoint and ends.

Examples:
  res2net-zoo finetune
  res2net-zoo finetune --model res2net50_26w_4s --pretrained --data my_images --output outputs/mine
  res2net-zoo finetune --processes 8 --recipe imagenet_modern --data ILSVRC/imagenet-1k --resume

Exit codes: 0 done; 2 bad input; 129, 130 and 143 stopped by SIGHUP, Ctrl-C or SIGTERM. `accelerate launch` turns every
failure into 1.
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import (
    MODEL,
    PROFILE,
    add_batch_size,
    add_machine,
    add_optimizer,
    add_run_folder,
    frozen_stages,
)
from res2net_zoo.cli.recipes import (
    RECIPES,
    check_same_settings,
    command_of,
    parse_run,
    recipe_names,
    run_folder,
    settings_of,
)
from res2net_zoo.cli.shipped import shipped_data
from res2net_zoo.utils.command_line import Parser, within


def build_parser() -> Parser:
    parser = parser_of(__doc__)
    add_data(parser.add_argument_group("model and data").add_argument)
    add_files(parser.add_argument_group("files").add_argument)
    add_length(parser.add_argument_group("duration and batches").add_argument)
    add_optimization(parser.add_argument_group("optimizer and schedule (names as in timm)").add_argument)
    add_model(parser.add_argument_group("model").add_argument)
    add_loss(parser.add_argument_group("loss").add_argument)
    add_augmentation(parser.add_argument_group("augmentation (names as in timm)").add_argument)
    return parser


def add_data(add: Callable[..., object]) -> None:
    """Add options of model and data."""
    flag = argparse.BooleanOptionalAction
    add("--model", default="res2net_tiny", help=MODEL)
    add("--pretrained", action=flag, default=False, help="start from the model's published weights")
    add(
        "--data",
        metavar="SRC",
        default=shipped_data(),
        help="labelled images, see `validate --help` (default: %(default)s)",
    )
    add("--train-split", default="train", help="split to train on (default: %(default)s)")
    add("--eval-split", help="split to evaluate on (default: validation, else test, else images held out)")
    add(
        "--hold-out",
        type=within(float, 1e-4, 0.9),
        default=0.2,
        help="share of each class to hold out (default: %(default)s)",
    )
    add("--label-column", help="label column, if ambiguous")
    add("--num-classes", type=within(int, 2), help="number of classes, if a stream does not define it")
    add("--streaming", action=flag, default=False, help="stream the images without caching them")
    add(
        "--shuffle-buffer",
        type=within(int, 1),
        default=1000,
        help="buffer size for shuffling a stream, in images (default: %(default)s)",
    )
    add(
        "--steps-per-epoch",
        type=within(int, 1),
        help="default: all images once; required for a stream of unknown length",
    )
    add("--check", action=flag, default=True, help="decode every image once before training starts")
    add("--skip-corrupt", action=flag, default=False, help="skip images that cannot be decoded, and report them")
    default = "digits without --model and --data, finetune with --pretrained, else scratch"
    add("--recipe", help=f"{recipe_names()}, or a .toml file (default: {default})")
    add(
        "--license",
        metavar="TEXT",
        help="licence of the result, for its card (default: that of the pretrained weights)",
    )


def add_files(add: Callable[..., object]) -> None:
    """Add options of the output."""
    add_run_folder(add, "outputs/finetune")
    add("--tracker", nargs="+", help="Accelerate's trackers, or none (default: tensorboard where it is installed)")


def add_length(add: Callable[..., object]) -> None:
    """Add options of duration and batches."""
    flag = argparse.BooleanOptionalAction
    add("--epochs", type=within(int, 1), default=20, help="number of epochs (default: %(default)s)")
    add("--patience", type=within(int, 0), help="stop after this many epochs without a better top-1; 0 to disable")
    add_batch_size(add, 64)
    add("--accumulate", type=within(int, 1), default=1, help="batches per optimizer step (default: %(default)s)")
    add("--seed", type=within(int, 0, 2**31), default=0, help="random seed (default: %(default)s)")
    add("--deterministic", action=flag, default=False, help="use deterministic operations on GPUs")
    add_machine(add)
    add("--profile", action="store_true", help=f"{PROFILE}, at the end")
    add("--compile", action=flag, default=False, help="compile the model by torch.compile")
    add("--channels-last", action=flag, default=True, help="use the channels-last memory format")
    add("--grad-checkpointing", action=flag, default=False, help="recompute activations to save memory")
    add("--sync-bn", action=flag, default=False, help="synchronize BatchNorm over all processes, on GPUs")


def add_optimization(add: Callable[..., object]) -> None:
    """Add options of optimizer and schedule."""
    flag = argparse.BooleanOptionalAction
    add_optimizer(add, weight_decay=0.05, warmup_epochs=1)
    add(
        "--lr-base-size",
        type=within(int, 1),
        help="global batch size for which --lr is given; it is scaled to the actual one",
    )
    add("--decay-all", action=flag, default=False, help="apply weight decay to biases and BatchNorm as well")
    add(
        "--layer-decay",
        type=within(float, 0, 1),
        help="layer-wise decay factor of the learning rate, from the last layer to the first",
    )


def add_model(add: Callable[..., object]) -> None:
    """Add options of the model during training."""
    flag = argparse.BooleanOptionalAction
    add(
        "--freeze",
        type=frozen_stages,
        default="0",
        metavar="N",
        help="number of stages to freeze, from the stem on, or `all` for all but the classifier (default: %(default)s)",
    )
    add("--freeze-bn", action=flag, default=False, help="do not update BatchNorm statistics")
    add("--drop", type=within(float, 0, 0.99), default=0.0, help="dropout before the classifier (default: %(default)s)")
    add("--drop-path", type=within(float, 0, 0.99), default=0.0, help="stochastic depth (default: %(default)s)")
    add(
        "--ema",
        type=within(float, 0, 1),
        help="decay of the moving average of the weights, such as 0.9998; 0 to disable",
    )
    add("--img-size", type=within(int, 8), help="height and width of the images in pixels (default: the model's own)")


def add_loss(add: Callable[..., object]) -> None:
    """Add options of the loss."""
    add(
        "--loss",
        choices=("ce", "bce"),
        default="ce",
        help="cross entropy or binary cross entropy (default: %(default)s)",
    )
    add("--bce-threshold", type=within(float, 0, 1), help="threshold above which a mixed target becomes 1 in bce")
    add("--smoothing", type=within(float, 0, 0.99), default=0.1, help="label smoothing (default: %(default)s)")
    add(
        "--balance",
        choices=("no", "loss", "sampling"),
        default="no",
        help="balance classes by loss weights or by sampling (default: %(default)s)",
    )
    add("--teacher", help="pretrained model for distillation, as for timm.create_model")
    add(
        "--task-weight",
        type=within(float, 0, 1),
        default=0.5,
        help="weight of the label loss; the rest is the distillation loss (default: %(default)s)",
    )
    add("--temperature", type=within(float, 0.01), default=1.0, help="distillation temperature (default: %(default)s)")


def add_augmentation(add: Callable[..., object]) -> None:
    """Add options of the augmentation."""
    area = within(float, 0.01, 1)
    add(
        "--scale",
        type=area,
        nargs=2,
        default=[0.35, 1.0],
        metavar=("LOW", "HIGH"),
        help="range of a random crop's area, as a share of the image (default: %(default)s)",
    )
    add(
        "--ratio",
        type=within(float, 0.1, 10),
        nargs=2,
        default=[0.75, 4 / 3],
        metavar=("LOW", "HIGH"),
        help="range of a random crop's aspect ratio (default: %(default)s)",
    )
    add(
        "--crop-padding",
        type=within(int, 0),
        default=0,
        help="padding in pixels for crops of the input size, instead of --scale and --ratio (default: %(default)s)",
    )
    add(
        "--hflip", type=within(float, 0, 1), default=0.5, help="probability of a horizontal flip (default: %(default)s)"
    )
    add("--vflip", type=within(float, 0, 1), default=0.0, help="probability of a vertical flip (default: %(default)s)")
    add("--color-jitter", type=within(float, 0), default=0.0, help="strength of color jitter (default: %(default)s)")
    add("--auto-augment", help="timm policy, such as rand-m9-mstd0.5, or none")
    add("--reprob", type=within(float, 0, 1), default=0.0, help="probability of random erasing (default: %(default)s)")
    add(
        "--repeats",
        type=within(int, 1),
        default=1,
        help="augmented copies of each image in a batch (default: %(default)s)",
    )
    add("--mixup", type=within(float, 0), default=0.0, help="mixup alpha (default: %(default)s)")
    add("--cutmix", type=within(float, 0), default=0.0, help="CutMix alpha (default: %(default)s)")
    add(
        "--mixup-prob",
        type=within(float, 0, 1),
        default=1.0,
        help="probability of mixup or CutMix per batch (default: %(default)s)",
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; options override the recipe, which overrides the defaults."""
    parser = build_parser()

    def recipe_of(args: argparse.Namespace) -> str:
        shipped = args.model == parser.get_default("model") and args.data == parser.get_default("data")
        return args.recipe or ("digits" if shipped else "finetune" if args.pretrained else "scratch")

    args = parse_run(parser, recipe_of, RECIPES, ("clip_grad", "ema", "patience", "auto_augment"), argv)
    if args.task_weight != parser.get_default("task_weight") and args.teacher is None:
        parser.error("distillation needs a teacher; set --teacher")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"mixup and CutMix need an even --batch-size, not {args.batch_size}")
    if args.balance == "loss" and args.loss == "bce":
        parser.error("--balance loss needs --loss ce; use --balance sampling with bce")
    if args.streaming and args.balance != "no":
        parser.error(f"--balance {args.balance} needs all labels in advance, which --streaming does not provide")
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.training import finetune
    from res2net_zoo.utils.files import locked_by_main

    run = run_folder(args.output)
    accelerator = finetune.start(args, run)
    check_same_settings(args)
    started_by = command_of("finetune", args, accelerator.num_processes, accelerator.device.type)
    with locked_by_main(args.output, accelerator):
        return finetune.train(args, run, settings_of(args), started_by, partial(check_command, args), accelerator)


def check_command(args: argparse.Namespace, split: str) -> str:
    """Return the command that measures the trained model again on a split of the data."""
    words = ["res2net-zoo", "validate", "--model", f"local-dir:{args.output}", "--data", args.data, "--split", split]
    words += ["--label-column", args.label_column] if args.label_column is not None else []
    words += [f"--{name.replace('_', '-')}" for name in ("streaming", "skip_corrupt") if getattr(args, name)]
    return shlex.join([*words, "--check"])
