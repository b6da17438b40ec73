"""Train a model for a task beyond classification on a backbone of the zoo, and write the best one as a folder.

Usage: accelerate launch scripts/train_task.py --task TASK --data SRC [--model NAME] [--pretrained]
                                               [--head HEAD] [--recipe NAME] [--output DIR] [--resume]

NAME is the backbone, as everywhere what timm.create_model takes; a folder that another task's training
wrote has one too, local-dir:DIR/backbone. docs/tasks.md says what SRC must look like for each task.

A recipe is a file of scripts/recipes/tasks/ (or the path of one) with values for any of the settings below;
what stands on the command line goes before it. DIR holds the best model by its task's figure, its card and
metrics.csv; DIR.run holds what a run needs to go on.

Exit codes: 0 done; 2 bad input; 130 and 143 stopped by Ctrl-C or SIGTERM. `accelerate launch` turns every
failure into 1.
"""

import argparse
import sys

from arguments import (
    RECIPES,
    Parser,
    add_machine,
    add_optimizer,
    add_run_folder,
    command_of,
    frozen_stages,
    named,
    parse_run,
    run_folder,
    settings_of,
    within,
)

TASKS = ("detection", "keypoints", "saliency", "segmentation")


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what to train, and on what").add_argument
    add("--task", choices=TASKS, help="or by the recipe")
    add("--data", help="what docs/tasks.md says for the task")
    add("--train-split", default="train", help="(%(default)s)")
    add("--eval-split", default="val", help="(%(default)s)")
    add("--model", default="res2net50_26w_4s", help="the backbone, what timm.create_model takes (%(default)s)")
    add("--pretrained", action=flag, default=False, help="start from the backbone's weights")
    add("--head", help="one of the task's; default its first")
    about = "options of the head's network, by the names of torchvision or segmentation_models_pytorch"
    add("--head-kwargs", type=named, nargs="+", default=[], metavar="NAME=VALUE", help=about)
    add("--output-stride", type=int, choices=(8, 16, 32), help="of the backbone, where the head can have another")
    add("--img-size", type=within(int, 32), help="pixels of a side; default the task's")
    about = "joints that a mirror exchanges, where their names do not show it; none: mirror no images"
    add("--flip-pairs", nargs="+", metavar="ONE:OTHER", help=about)
    add(
        "--scales",
        type=within(float, 0.01),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="by which images are scaled at random",
    )
    add(
        "--freeze",
        type=frozen_stages,
        default="0",
        help="stages of the backbone, the stem being the first; or all (%(default)s)",
    )
    add("--freeze-bn", action=flag, default=False, help="keep every BatchNorm of the backbone as it is")
    add("--recipe", help="name in scripts/recipes/tasks or a .toml file")
    add("--license", help="licence of the result, for its card")

    add = parser.add_argument_group("files").add_argument
    add_run_folder(add, "outputs/task")

    add = parser.add_argument_group("optimizer and schedule, by timm's names").add_argument
    add("--epochs", type=within(int, 1), default=12, help="(%(default)s)")
    add("--batch-size", type=within(int, 1), default=8, help="images a batch and process (%(default)s)")
    add_optimizer(add, weight_decay=1e-4, warmup_epochs=0)

    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=within(int, 0, 2**31), default=0, help="(%(default)s)")
    add_machine(add)

    args = parse_run(parser, lambda args: args.recipe, RECIPES / "tasks", ("clip_grad",))
    if args.task is None:
        parser.error(f"name the --task: {', '.join(TASKS)}")
    if args.data is None:
        parser.error("name the --data; docs/tasks.md says what it must look like")
    return args


def main(args: argparse.Namespace) -> int:
    from res2net_zoo.tasks import training
    from res2net_zoo.utils.files import locked_by_main
    from res2net_zoo.utils.processes import start_processes

    accelerator = start_processes(args.threads, args.mixed_precision)
    args.mixed_precision = accelerator.mixed_precision  # which `accelerate launch` may have decided
    command = command_of("train_task.py", args, accelerator.num_processes, accelerator.device.type)
    with locked_by_main(args.output, accelerator):
        return training.train(args, run_folder(args.output), settings_of(args), command, accelerator)


if __name__ == "__main__":
    arguments = parse_args()

    from res2net_zoo.utils.console import run

    sys.exit(run(lambda: main(arguments)))
