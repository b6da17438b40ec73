"""The command `res2net-zoo`.

It is outside the package, because importing the package imports torch and timm, which takes seconds: `--help` and
wrong options are answered before that.
"""

import importlib.util
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of the zoo; return its exit code.

    The package is entered into `sys.modules` without being run, so that the modules that read the command line can be
    imported; `res2net_zoo.cli.command.run_package` runs it once the command line is read.

    Args:
        argv: The command and its options, in place of the command line.
    """
    if "res2net_zoo" not in sys.modules:
        spec = importlib.util.find_spec("res2net_zoo")
        if spec is None:
            raise ModuleNotFoundError("No module named 'res2net_zoo'", name="res2net_zoo")
        sys.modules["res2net_zoo"] = importlib.util.module_from_spec(spec)
    from res2net_zoo.cli import main as run_command

    return run_command(argv)
