"""Wrapper of every command: creates its parser from its docstring, and turns errors into exit codes."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from res2net_zoo.utils.command_line import Parser
from res2net_zoo.utils.console import run
from res2net_zoo.utils.launch import check_processes, joined, launch, launched
from res2net_zoo.utils.processes import leave


def parser_of(doc: str | None) -> Parser:
    """Return a parser without options, whose help is a docstring; options are printed before its `Examples:`."""
    description, examples, rest = (doc or "").partition("Examples:")
    usage = re.search(r"Usage: (res2net-zoo [a-z-]+)", description)
    return Parser(prog=usage and usage[1], description=description.rstrip(), epilog=f"{examples}{rest}".rstrip())


def command(
    parse_args: Callable[[Sequence[str] | None], argparse.Namespace],
) -> Callable[[Callable[[argparse.Namespace], int]], Callable[[Sequence[str] | None], int]]:
    """Return a decorator that turns a function of parsed arguments into a program.

    The program takes a list of arguments, or None for those of `sys.argv`, and returns an exit code. For bad input it
    prints one line on stderr; options are checked before slow modules are imported.

    Args:
        parse_args: Parses the arguments.
    """

    def decorate(program: Callable[[argparse.Namespace], int]) -> Callable[[Sequence[str] | None], int]:
        def main(argv: Sequence[str] | None = None) -> int:
            args = parse_args(argv)

            def start() -> int:
                if number := None if launched() else getattr(args, "processes", None):
                    check_processes(number)
                    if number > 1:
                        words = sys.argv[1:] if argv is None else argv
                        return launch(number, [program.__module__.rpartition(".")[2].replace("_", "-"), *words])
                with joined() if launched() else nullcontext():
                    run_package()
                    code = program(args)
                    leave()
                    return code

            return run(start, options={name: f"--{name.replace('_', '-')}" for name in vars(args)})

        return main

    return decorate


def run_package() -> None:
    """Run `res2net_zoo/__init__.py`, which registers the models, if `res2net_zoo_cli` has skipped it."""
    package = sys.modules["res2net_zoo"]
    if not hasattr(package, "cifar_res2next") and package.__spec__ and package.__spec__.loader:
        package.__spec__.loader.exec_module(package)
