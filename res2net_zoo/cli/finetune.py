"""Train or fine-tune a classifier, and write the best epoch as a model folder.

Usage: res2net-zoo finetune [--model NAME] [--pretrained] [--data SRC] [--recipe NAME] [--output DIR] [--resume]

With neither --model nor --data it trains the shipped model on the shipped digits.

A recipe is a file with values for any of the settings below; options on the command line override it. DIR holds the
best model by its top-1 on the evaluation split (of several, the last), its card, recipe.toml with every setting,
metrics.csv and pictures; timm reads it as local-dir:DIR. DIR.run holds the checkpoints and the trackers' files.
--resume goes on from the last checkpoint, or starts where there is none. SIGTERM and Ctrl-C save a checkpoint and end
the run.

Examples:
  res2net-zoo finetune
  res2net-zoo finetune --model res2net50_26w_4s --pretrained --data my_images --output outputs/mine
  accelerate launch -m res2net_zoo finetune --recipe imagenet_modern --data ILSVRC/imagenet-1k --resume

Exit codes: 0 done; 2 bad input; 130 and 143 stopped by Ctrl-C or SIGTERM. `accelerate launch` turns every failure into
1.
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import MODEL, add_batch_size, add_machine, add_optimizer, add_run_folder, frozen_stages
from res2net_zoo.cli.recipes import RECIPES, command_of, parse_run, recipe_names, run_folder, settings_of
from res2net_zoo.cli.shipped import shipped_data
from res2net_zoo.utils.command_line import Parser, within


def build_parser() -> Parser:
    parser = parser_of(__doc__)
    add_data(parser.add_argument_group("what to train, and on what").add_argument)
    add_files(parser.add_argument_group("files").add_argument)
    add_length(parser.add_argument_group("how long, and how much at once").add_argument)
    add_optimization(parser.add_argument_group("optimizer and schedule, by timm's names").add_argument)
    add_model(parser.add_argument_group("the model in training").add_argument)
    add_loss(parser.add_argument_group("loss").add_argument)
    add_augmentation(parser.add_argument_group("augmentation, by timm's names").add_argument)
    return parser


def add_data(add: Callable[..., object]) -> None:
    """Add what to train, and on what."""
    flag = argparse.BooleanOptionalAction
    add("--model", default="res2net_tiny", help=MODEL)
    add("--pretrained", action=flag, default=False, help="start from the model's published weights")
    add("--data", metavar="SRC", default=shipped_data(), help="labelled images, as for validate (default: %(default)s)")
    add("--train-split", default="train", help="split to train on (default: %(default)s)")
    add("--eval-split", help="split to evaluate on (default: validation, else test, else images held out)")
    add(
        "--hold-out",
        type=within(float, 1e-4, 0.9),
        default=0.2,
        help="share of each class to hold out (default: %(default)s)",
    )
    add("--label-column", help="column of the labels, where it is ambiguous")
    add("--num-classes", type=within(int, 2), help="number of classes, for a stream without it")
    add("--streaming", action=flag, default=False, help="read the images as a stream, without a cache")
    add(
        "--shuffle-buffer",
        type=within(int, 1),
        default=1000,
        help="images of a stream to shuffle among (default: %(default)s)",
    )
    add(
        "--steps-per-epoch", type=within(int, 1), help="default: all images once; needed for a stream of unknown length"
    )
    add("--check", action=flag, default=True, help="decode every image once before training starts")
    add("--skip-corrupt", action=flag, default=False, help="skip images that cannot be decoded, and report them")
    add("--recipe", help=f"{recipe_names()}, or a .toml file (default: finetune with --pretrained, else scratch)")
    add(
        "--license",
        metavar="TEXT",
        help="licence of the result, for its card (default: that of the pretrained weights)",
    )


def add_files(add: Callable[..., object]) -> None:
    """Add where the run writes."""
    add_run_folder(add, "outputs/finetune")
    add("--tracker", nargs="+", help="Accelerate's trackers, or none (default: tensorboard where it is installed)")


def add_length(add: Callable[..., object]) -> None:
    """Add how long to train, and how much at once."""
    flag = argparse.BooleanOptionalAction
    add("--epochs", type=within(int, 1), default=20, help="passes through the images (default: %(default)s)")
    add("--patience", type=within(int, 0), help="stop after so many epochs without a better top-1; 0 for never")
    add_batch_size(add, 64)
    add("--accumulate", type=within(int, 1), default=1, help="batches an optimizer step (default: %(default)s)")
    add("--seed", type=within(int, 0, 2**31), default=0, help="of all random numbers (default: %(default)s)")
    add("--deterministic", action=flag, default=False, help="use deterministic operations on GPUs")
    add_machine(add)
    add("--compile", action=flag, default=False, help="torch.compile the model")
    add("--channels-last", action=flag, default=True, help="memory format of the model and its input")
    add("--grad-checkpointing", action=flag, default=False, help="trade time for memory")
    add("--sync-bn", action=flag, default=False, help="synchronize BatchNorm over all processes, on GPUs")


def add_optimization(add: Callable[..., object]) -> None:
    """Add optimizer and schedule."""
    flag = argparse.BooleanOptionalAction
    add_optimizer(add, weight_decay=0.05, warmup_epochs=1)
    add("--lr-base-size", type=within(int, 1), help="images a step that --lr is for; it is scaled to the actual number")
    add("--decay-all", action=flag, default=False, help="apply weight decay to biases and BatchNorm as well")
    add(
        "--layer-decay",
        type=within(float, 0, 1),
        help="factor of the learning rate from each layer to the previous one",
    )


def add_model(add: Callable[..., object]) -> None:
    """Add what training changes of the model."""
    flag = argparse.BooleanOptionalAction
    add(
        "--freeze",
        type=frozen_stages,
        default="0",
        metavar="N",
        help="stages to freeze, counted from the stem, or all for all but the classifier (default: %(default)s)",
    )
    add("--freeze-bn", action=flag, default=False, help="keep the statistics of every BatchNorm")
    add("--drop", type=within(float, 0, 0.99), default=0.0, help="dropout before the classifier (default: %(default)s)")
    add("--drop-path", type=within(float, 0, 0.99), default=0.0, help="stochastic depth (default: %(default)s)")
    add("--ema", type=within(float, 0, 1), help="decay of a moving average of the weights, such as 0.9998; 0 for none")
    add("--img-size", type=within(int, 8), help="height and width of the images in pixels (default: the model's own)")


def add_loss(add: Callable[..., object]) -> None:
    """Add the loss."""
    add(
        "--loss",
        choices=("ce", "bce"),
        default="ce",
        help="cross entropy, or binary cross entropy of each class (default: %(default)s)",
    )
    add("--bce-threshold", type=within(float, 0, 1), help="threshold above which a mixed target counts as 1, for bce")
    add("--smoothing", type=within(float, 0, 0.99), default=0.1, help="label smoothing (default: %(default)s)")
    add(
        "--balance",
        choices=("no", "loss", "sampling"),
        default="no",
        help="balance the classes by weights in the loss or by sampling (default: %(default)s)",
    )
    add("--teacher", help="pretrained model to distil from, what timm.create_model takes")
    add(
        "--task-weight",
        type=within(float, 0, 1),
        default=0.5,
        help="weight of the labels; the teacher has the rest (default: %(default)s)",
    )
    add("--temperature", type=within(float, 0.01), default=1.0, help="of the distillation (default: %(default)s)")


def add_augmentation(add: Callable[..., object]) -> None:
    """Add the augmentation."""
    area = within(float, 0.01, 1)
    add(
        "--scale",
        type=area,
        nargs=2,
        default=[0.35, 1.0],
        metavar=("LOW", "HIGH"),
        help="share of the image that a random crop keeps (default: %(default)s)",
    )
    add(
        "--ratio",
        type=within(float, 0.1, 10),
        nargs=2,
        default=[0.75, 4 / 3],
        metavar=("LOW", "HIGH"),
        help="aspect ratio of a random crop (default: %(default)s)",
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
    add("--auto-augment", help="policy, such as rand-m9-mstd0.5, or none")
    add("--reprob", type=within(float, 0, 1), default=0.0, help="probability of random erasing (default: %(default)s)")
    add("--repeats", type=within(int, 1), default=1, help="augmentations of an image in a batch (default: %(default)s)")
    add("--mixup", type=within(float, 0), default=0.0, help="mixup alpha (default: %(default)s)")
    add("--cutmix", type=within(float, 0), default=0.0, help="CutMix alpha (default: %(default)s)")
    add(
        "--mixup-prob",
        type=within(float, 0, 1),
        default=1.0,
        help="probability of mixup or CutMix of a batch (default: %(default)s)",
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line over the recipe's settings over the defaults."""
    parser = build_parser()

    def recipe_of(args: argparse.Namespace) -> str:
        shipped = args.model == parser.get_default("model") and args.data == parser.get_default("data")
        return args.recipe or ("digits" if shipped else "finetune" if args.pretrained else "scratch")

    args = parse_run(parser, recipe_of, RECIPES, ("clip_grad", "ema", "patience", "auto_augment"), argv)
    if args.task_weight != parser.get_default("task_weight") and args.teacher is None:
        parser.error("this learns from a larger model; name it with --teacher")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"mixup and CutMix pair the images of a batch; --batch-size {args.batch_size} is odd")
    if args.balance == "loss" and args.loss == "bce":
        parser.error("--balance loss weighs classes in --loss ce; with bce, --balance sampling does it")
    if args.streaming and args.balance != "no":
        parser.error(f"--balance {args.balance} needs to know all labels, which a stream does not tell")
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.training import finetune
    from res2net_zoo.utils.files import locked_by_main

    run = run_folder(args.output)
    accelerator = finetune.start(args, run)
    started_by = command_of("finetune", args, accelerator.num_processes, accelerator.device.type)
    with locked_by_main(args.output, accelerator):
        return finetune.train(args, run, settings_of(args), started_by, partial(check_command, args), accelerator)


def check_command(args: argparse.Namespace, split: str) -> str:
    """Return the command that measures the trained model again on a split of the data."""
    words = ["res2net-zoo", "validate", "--model", f"local-dir:{args.output}", "--data", args.data, "--split", split]
    words += ["--label-column", args.label_column] if args.label_column is not None else []
    words += [f"--{name.replace('_', '-')}" for name in ("streaming", "skip_corrupt") if getattr(args, name)]
    return shlex.join([*words, "--check"])
