"""The settings of a training: from a recipe or an earlier run, and over them the command line."""

import argparse
import json
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from res2net_zoo.cli.shipped import shipped
from res2net_zoo.utils.command_line import Parser, did_you_mean

RECIPES = shipped("recipes")

LARGEST_RECIPE = 2**20  # bytes

# Options that a recipe does not set: they are about this run's files.
NOT_SETTINGS = {"output", "recipe", "resume", "overwrite", "words"}
# Settings that a run can go on with other values of. So can it with --batch-size and --accumulate,
# if the images of a step, over all processes, stay as many.
FREE = {"workers", "threads", "save_minutes", "keep", "tracker", "epochs", "patience", "license"}
FREE |= {"batch_size", "accumulate"}


def recipe_names(folder: str = "") -> str:
    """Return the names of the shipped recipes, or of those in a folder of them."""
    return ", ".join(sorted(path.stem for path in (RECIPES / folder).glob("*.toml")))


def find_recipe(parser: Parser, name: str, folder: Path = RECIPES) -> Path:
    """Return the file of a recipe: one of a folder by its name, or any by its path."""
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not os.path.isfile(path):
        names = sorted(recipe.stem for recipe in folder.glob("*.toml"))
        if path.parent == folder:
            hint = did_you_mean(name, names, f"there are {', '.join(names)}")
            parser.error(f"no recipe {name}; {hint}")
        shipped = f"; the name alone finds one of {folder}" if path.stem in names else ""
        parser.error(f"no recipe file {name}{shipped}")
    return path


def read_recipe(parser: Parser, path: Path, settings: Sequence[str]) -> list[str]:
    """Return the settings of a recipe as options, each of which is checked."""
    try:
        if path.stat().st_size > LARGEST_RECIPE:
            parser.error(f"recipe {path} is larger than the limit of {LARGEST_RECIPE:,} bytes")
        recipe = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        parser.error(f"cannot read recipe {path}: {error.strerror}")
    except RecursionError:
        parser.error(f"recipe {path} is nested too deeply")
    except ValueError as error:
        parser.error(f"recipe {path} is not TOML: {error}")
    words: list[str] = []
    for key, value in recipe.items():
        if key not in settings:
            hint = did_you_mean(key, settings, "--help lists them")
            parser.error(f"recipe {path} sets {key}, which is not a setting; {hint}")
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, dict):
            words += [option, *(f"{name}={json.dumps(entry, default=str)}" for name, entry in value.items())]
        elif isinstance(value, list):
            if any(str(entry).startswith("--") for entry in value):
                parser.error(f"recipe {path}: {key} must be a list of values, without options")
            words += [option, *map(str, value)]
        else:
            words.append(f"{option}={value}")  # in one word, since the value may begin with a dash
    parser.source = f"recipe {path}: "
    parser.parse_args(words)
    parser.source = ""
    return words


def parse_over(
    parser: Parser,
    recipes: Iterable[Path],
    not_settings: Iterable[str] = (),
    options: Sequence[str] = (),
) -> argparse.Namespace:
    """Parse the command line over the settings of recipes, which override the defaults.

    Args:
        parser: The program's.
        recipes: TOML files of settings, by the options' names with underscores; later ones go before
            earlier ones.
        not_settings: Options that a recipe must not set.
        options: The words of the command line.

    Returns:
        The arguments. A recipe's values are checked as options are; the program ends if one is wrong.
    """
    settings = sorted({action.dest for action in parser._actions} - {"help", *not_settings})
    words: list[str] = []
    for path in recipes:
        words += read_recipe(parser, path, settings)
    return parser.parse_args([*words, *options])


def run_folder(output: Path) -> Path:
    """Return where a run keeps its state: beside the model folder, which is replaced as a whole."""
    output = output.resolve()
    return output.parent / f"{output.name}.run"


def near(value: Any) -> Any:
    """Return a setting with the path in it relative to this folder, where it leads into it."""
    if not isinstance(value, str):
        return value
    head, colon, tail = value.rpartition("local-dir:")
    here = os.path.relpath(tail) if os.path.isabs(tail) or colon else tail
    return value if here.startswith("..") else f"{head}{colon}{here}"


def parse_run(
    parser: Parser,
    recipe_of: Callable[[argparse.Namespace], str | None],
    folder: Path,
    none_words: Iterable[str],
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse the command line of a training: over a recipe's settings, or over those of the run that goes on.

    Args:
        parser: The program's, with `add_run_folder` and `--recipe`.
        recipe_of: Says the recipe where the run is new, by the options alone; None for none.
        folder: Of recipes that are named without their path.
        none_words: Options of which 0 and none mean what leaving them out does without a recipe.
        argv: The words of the command line; None for those of this process.

    Returns:
        The arguments, and as `words` those of the command line; the program ends if something is wrong with them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite replaces it; choose one")
    stored = run_folder(args.output) / "recipe.toml"
    if args.resume and stored.is_file():
        args = parse_over(parser, [stored], NOT_SETTINGS, words)
        before = parse_over(parser, [stored], NOT_SETTINGS)
        for key in sorted(vars(args).keys() - NOT_SETTINGS - FREE):
            now, then = near(getattr(args, key)), near(getattr(before, key))
            setattr(args, key, now)
            if now != then:
                option = key.replace("_", "-")
                parser.error(
                    f"the run in {args.output} was started with --{option} {then}, not {now}; leave --{option} out "
                    "to go on with it, or name another --output"
                )
    else:
        name = recipe_of(args)
        args = parse_over(parser, [] if name is None else [find_recipe(parser, name, folder)], NOT_SETTINGS, words)
        args.recipe = name
    for key in none_words:
        if getattr(args, key) in (0, "none"):
            setattr(args, key, None)
    for key, value in vars(args).items():
        # A card and a recipe hold all settings, and are UTF-8.
        if any("\ud800" <= letter <= "\udfff" for letter in str(value)):
            name = str(value).encode("ascii", "backslashreplace").decode()
            parser.error(f"--{key.replace('_', '-')} {name} is not UTF-8; rename it")
    if args.output.resolve() in (Path.cwd(), *Path.cwd().parents):
        parser.error(f"--output {args.output} is a folder that this runs in; name one of its own")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; name a folder")
    if args.output.exists() and not (args.output / "config.json").is_file() and any(args.output.iterdir()):
        parser.error(f"--output {args.output} holds other things than a model; name another folder")
    args.words = words
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a training that have a value, as a recipe has them."""
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS and value not in (None, [])}
    if "head_kwargs" in settings:
        settings["head_kwargs"] = dict(settings["head_kwargs"])
    return settings


def command_of(program: str, args: argparse.Namespace, processes: int, device: str) -> str:
    """Return the command that makes the same run."""
    launch = f"--multi_gpu --num_processes {processes} " if processes > 1 else ""
    cpu = "ACCELERATE_USE_CPU=true " if launch and device == "cpu" else ""
    options = ["--recipe", "recipe.toml"] if args.resume else args.words
    return f"{cpu}accelerate launch {launch}-m res2net_zoo {program} {shlex.join(options)}".strip()
