"""What the command lines of the training programs share."""
# ruff: noqa: E402

import sys
from importlib import util

deferred = "res2net_zoo" not in sys.modules
if deferred and (spec := util.find_spec("res2net_zoo")):
    sys.modules["res2net_zoo"] = util.module_from_spec(spec)  # without running it, which imports torch

from res2net_zoo.cli.options import add_machine, add_optimizer, add_run_folder, frozen_stages, named
from res2net_zoo.cli.recipes import RECIPES, command_of, parse_run, run_folder, settings_of
from res2net_zoo.cli.shipped import shipped
from res2net_zoo.utils.command_line import Parser, within

if deferred:
    for name in [name for name in sys.modules if name.partition(".")[0] == "res2net_zoo"]:
        del sys.modules[name]

SHIPPED_DATA = shipped("datasets", "digits")

__all__ = [
    "RECIPES",
    "SHIPPED_DATA",
    "Parser",
    "add_machine",
    "add_optimizer",
    "add_run_folder",
    "command_of",
    "frozen_stages",
    "named",
    "parse_run",
    "run_folder",
    "settings_of",
    "within",
]
