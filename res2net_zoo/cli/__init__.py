"""The command line: one module per command, which parses its options before it imports slow modules.

The command `train-task` is the module `train_task`, and so on. Each has `parse_args(argv)` and `main(argv)`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from res2net_zoo.utils.command_line import Parser

COMMANDS = {
    "The catalogue": ("list", "show", "sizes", "ablate", "space"),
    "Classification": ("validate", "finetune", "predict", "export", "benchmark", "cam"),
    "Detection, segmentation, saliency, keypoints": ("train-task", "validate-task", "predict-task"),
    "Weights and the Hub": ("convert", "original", "sign", "verify", "publish", "mirror"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    Args:
        argv: The command and its options; default: those of `sys.argv`.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]  # `list` is a module of this package
    commands = [command for group in COMMANDS.values() for command in group]
    parser = Parser(
        prog="res2net-zoo",
        description="Usage: res2net-zoo COMMAND [OPTIONS]\n\n"
        "Published Res2Nets for timm: measure, train, export and share them.",
        epilog="" if words[:1] and words[0] in commands else overview(),
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of the commands below")
    command = parser.parse_args(words[:1]).command
    return import_module(f"{__name__}.{command.replace('-', '_')}").main(words[1:])


def overview() -> str:
    """Return a list of the commands with one-line descriptions, and general help."""
    parts = []
    for title, commands in COMMANDS.items():
        modules = {command: import_module(f"{__name__}.{command.replace('-', '_')}") for command in commands}
        lines = [
            f"  {command:14} {(module.__doc__ or '').partition(chr(10))[0]}" for command, module in modules.items()
        ]
        parts.append("\n".join([f"{title}:", *lines]))
    parts += [
        "`res2net-zoo COMMAND --help` lists a command's options.\n"
        "`--processes N` of some commands runs them on several GPUs or CPU processes; for several machines, use\n"
        "`accelerate launch -m res2net_zoo COMMAND`.",
        "Exit codes: 0 done; 1 a check failed; 2 bad input; 129, 130, 143 stopped by SIGHUP, Ctrl-C, SIGTERM.",
    ]
    return "\n\n".join(parts)
