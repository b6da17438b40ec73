"""Train a detection, segmentation, saliency or keypoint model on a backbone of the zoo.

Usage: res2net-zoo train-task --task TASK --data SRC [--model NAME] [--pretrained] [--recipe NAME] [--output DIR]

NAME is the backbone, as for timm.create_model; local-dir:DIR/backbone is that of a model folder of another task.
docs/tasks.md describes what SRC must contain for each task.

A recipe is a file with values for any of the settings below; options on the command line override it. DIR contains
the model with the best figure of its task, its card and metrics.csv; DIR.run contains the checkpoints. --resume
continues from the last checkpoint, or starts a new run if there is none.

Examples:
  res2net-zoo train-task --task segmentation --data VOC2012 --model res2net50_26w_4s --pretrained --output outputs/voc
  res2net-zoo train-task --processes 8 --recipe detection_coco --data COCO --output outputs/coco --resume

Exit codes: 0 done; 2 bad input; 129, 130 and 143 stopped by SIGHUP, Ctrl-C or SIGTERM. `accelerate launch` turns every
failure into 1.
"""

import argparse
from collections.abc import Sequence

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import (
    MODEL,
    add_batch_size,
    add_machine,
    add_optimizer,
    add_run_folder,
    frozen_stages,
    named,
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
from res2net_zoo.utils.command_line import within

TASKS = ("detection", "keypoints", "saliency", "segmentation")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    flag = argparse.BooleanOptionalAction

    add = parser.add_argument_group("model and data").add_argument
    add("--task", choices=TASKS, help="task, unless the recipe sets it")
    add("--data", metavar="SRC", help="annotated images, as docs/tasks.md describes for the task")
    add("--train-split", default="train", help="split to train on (default: %(default)s)")
    add("--eval-split", default="val", help="split to evaluate on (default: %(default)s)")
    add("--model", default="res2net50_26w_4s", help=f"the backbone, {MODEL}")
    add("--pretrained", action=flag, default=False, help="start from the backbone's weights")
    add("--head", help="head on the backbone (default: the first of the task)")
    about = "arguments of the head, as in torchvision or segmentation_models_pytorch"
    add("--head-kwargs", type=named, nargs="+", default=[], metavar="NAME=VALUE", help=about)
    add(
        "--output-stride",
        type=int,
        choices=(8, 16, 32),
        help="output stride of the backbone, for heads that support it",
    )
    add("--img-size", type=within(int, 32), help="height and width of the images in pixels (default: the task's own)")
    about = "keypoints that a horizontal flip swaps (default: by their names); none to disable flips"
    add("--flip-pairs", nargs="+", metavar="ONE:OTHER", help=about)
    add(
        "--scales",
        type=within(float, 0.01),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the random scale of images",
    )
    add(
        "--freeze",
        type=frozen_stages,
        default="0",
        metavar="N",
        help="number of backbone stages to freeze, starting at the stem, or all (default: %(default)s)",
    )
    add("--freeze-bn", action=flag, default=False, help="do not update BatchNorm statistics of the backbone")
    add("--recipe", help=f"{recipe_names('tasks')}, or a .toml file")
    add("--license", metavar="TEXT", help="licence of the result, for its card")

    add = parser.add_argument_group("files").add_argument
    add_run_folder(add, "outputs/task")

    add = parser.add_argument_group("optimizer and schedule (names as in timm)").add_argument
    add("--epochs", type=within(int, 1), default=12, help="number of epochs (default: %(default)s)")
    add_batch_size(add, 8)
    add_optimizer(add, weight_decay=1e-4, warmup_epochs=0)

    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=within(int, 0, 2**31), default=0, help="random seed (default: %(default)s)")
    add_machine(add)

    args = parse_run(parser, lambda args: args.recipe, RECIPES / "tasks", ("clip_grad",), argv)
    if args.task is None:
        parser.error(f"name the --task: {', '.join(TASKS)}")
    if args.data is None:
        parser.error("name the --data; docs/tasks.md describes its format")
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.tasks import training
    from res2net_zoo.utils.files import locked_by_main
    from res2net_zoo.utils.processes import start_processes

    accelerator = start_processes(args.threads, args.mixed_precision)
    args.mixed_precision = accelerator.mixed_precision  # may be set by `accelerate launch`
    check_same_settings(args)
    started_by = command_of("train-task", args, accelerator.num_processes, accelerator.device.type)
    with locked_by_main(args.output, accelerator):
        return training.train(args, run_folder(args.output), settings_of(args), started_by, accelerator)
