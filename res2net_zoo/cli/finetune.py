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
import os
import sys

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
    from res2net_zoo.training import finetune
    from res2net_zoo.utils.files import locked_by_main

    run = run_folder(args.output)
    accelerator = finetune.start(args, run)
    command = command_of("finetune.py", args, accelerator.num_processes, accelerator.device.type)
    with locked_by_main(args.output, accelerator):
        return finetune.train(args, run, settings_of(args), command, accelerator)


if __name__ == "__main__":
    arguments = parse_args()

    from res2net_zoo.utils.console import run as run_program

    sys.exit(run_program(lambda: main(arguments)))
