"""What the programs' command lines share. It imports nothing slow, so that `--help` answers at once."""

import argparse
import difflib
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "scripts" / "recipes"
SHIPPED_MODEL = ROOT / "hub" / "models" / "res2net_tiny.digits"
SHIPPED_DATA = ROOT / "hub" / "datasets" / "digits"


def within(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return an argument type: an int or float from `low` to `high`."""

    def parse(text: str) -> float:
        if not low <= (number := kind(text)) <= high:  # so that not-a-number is refused as well
            raise argparse.ArgumentTypeError(f"{text} is not {low} or more" + (f", up to {high}" * (high < math.inf)))
        return number

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def named(text: str) -> tuple[str, object]:
    """Read NAME=VALUE, an argument type; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_run_folder(add: Callable[..., object], output: str) -> None:
    """Add where a training writes, and how often."""
    add("--output", type=Path, default=Path(output), help="model folder to write (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in --output, with its settings")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--save-minutes", type=within(float, 0), default=15, help="between checkpoints in an epoch (%(default)s)")
    add("--keep", type=within(int, 1), default=2, help="checkpoints to keep (%(default)s)")


def add_machine(add: Callable[..., object], workers: bool = True) -> None:
    """Add what a program takes of the machine."""
    if workers:
        about = "loader processes for each process (default by the machine)"
        add("--workers", type=within(int, 0), metavar="N", help=about)
    about = "CPU threads for each process (default its share of the cores)"
    add("--threads", type=within(int, 1), metavar="N", help=about)
    about = "default as `accelerate config` says, else no"
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help=about)


def find_recipe(parser: argparse.ArgumentParser, name: str, folder: Path = RECIPES) -> Path:
    """Return the file of a recipe: one of a folder by its name, or any by its path."""
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        names = sorted(recipe.stem for recipe in folder.glob("*.toml"))
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        parser.error(f"no recipe {name}; {hint}")
    return path


def parse_over(
    parser: argparse.ArgumentParser,
    recipes: Iterable[Path],
    not_settings: Iterable[str] = (),
    options: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse the command line over the settings of recipes, which stand over the defaults.

    Args:
        parser: The program's.
        recipes: TOML files of settings, by the options' names with underscores; later ones go before
            earlier ones.
        not_settings: Options that a recipe must not set.
        options: In place of the command line.

    Returns:
        The arguments. What a recipe says is checked just as options are; the program ends if it is wrong.
    """
    settings = sorted({action.dest for action in parser._actions} - {"help", *not_settings})
    words: list[str] = []
    for path in recipes:
        try:
            recipe = tomllib.loads(path.read_text())
        except OSError as error:
            parser.error(f"cannot read recipe {path}: {error.strerror}")
        except ValueError as error:
            parser.error(f"recipe {path} is no TOML: {error}")
        for key in recipe:
            if key not in settings:
                close = difflib.get_close_matches(key, settings, n=1)
                hint = f"did you mean {close[0]}?" if close else "--help lists them"
                parser.error(f"recipe {path} sets {key}, which is no setting; {hint}")
        for key, value in recipe.items():
            option = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            elif isinstance(value, dict):
                words += [f"--{option}", *(f"{name}={json.dumps(entry)}" for name, entry in value.items())]
            else:
                words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return parser.parse_args([*words, *(sys.argv[1:] if options is None else options)])
