"""Settings of a training run: defaults, overridden by a recipe or an earlier run, then by the command line."""

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
from res2net_zoo.utils.processes import check_same

RECIPES = shipped("recipes")

LARGEST_RECIPE = 2**20  # bytes

# Options that are not settings of a recipe, because they do not change the model.
NOT_SETTINGS = {"output", "recipe", "resume", "overwrite", "profile", "words", "processes"}
# Settings that may change when a run is resumed. --batch-size and --accumulate may change only together with the
# number of processes, so that the global batch size remains the same.
FREE = {"workers", "threads", "save_minutes", "keep", "tracker", "epochs", "patience", "license"}
FREE |= {"batch_size", "accumulate"}

# Settings that may differ between machines, in addition to the paths of models.
OWN_SETTINGS = {"data", "output", "recipe", "words", "threads", "workers", "keep", "save_minutes", "tracker", "license"}


def recipe_names(folder: str = "") -> str:
    """Return the names of the shipped recipes in a subfolder, separated by commas."""
    return ", ".join(sorted(path.stem for path in (RECIPES / folder).glob("*.toml")))


def find_recipe(parser: Parser, name: str, folder: Path = RECIPES) -> Path:
    """Return the path of a recipe, given by its name in `folder` or by its path."""
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not os.path.isfile(path):
        names = sorted(recipe.stem for recipe in folder.glob("*.toml"))
        if path.parent == folder:
            hint = did_you_mean(name, names, f"available: {', '.join(names)}")
            parser.error(f"no recipe {name}; {hint}")
        shipped = f"; for the one in {folder}, give its name without .toml" if path.stem in names else ""
        parser.error(f"no recipe file {name}{shipped}")
    return path


def read_recipe(parser: Parser, path: Path, settings: Sequence[str]) -> list[str]:
    """Return the settings of a recipe as options, after checking each."""
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
            words.append(f"{option}={value}")  # in one word, because the value may start with a dash
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
    """Parse the command line, whose options override recipes, which override the defaults.

    Args:
        parser: The parser of the program.
        recipes: TOML files with settings, named as options with underscores; later files override earlier ones.
        not_settings: Options that a recipe must not set.
        options: The arguments of the command line.

    Returns:
        The arguments. Values of recipes are checked like options; the program exits if one is invalid.
    """
    settings = sorted({action.dest for action in parser._actions} - {"help", *not_settings})
    words: list[str] = []
    for path in recipes:
        words += read_recipe(parser, path, settings)
    return parser.parse_args([*words, *options])


def run_folder(output: Path) -> Path:
    """Return the folder of a run's checkpoints, next to the model folder, which is replaced as a whole."""
    output = output.resolve()
    return output.parent / f"{output.name}.run"


def near(value: Any) -> Any:
    """Return a setting; a path inside the current folder is made relative to it."""
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
    """Parse the command line of a training program, with the settings of a recipe or of the resumed run.

    Args:
        parser: The parser of the program, with `add_run_folder` and `--recipe`.
        recipe_of: Returns the recipe of a new run, given its options; None for no recipe.
        folder: The folder of recipes that are given by name.
        none_words: Options whose values 0 and none mean the same as their default None.
        argv: The arguments of the command line; None for those of `sys.argv`.

    Returns:
        The parsed arguments, and the unparsed ones as `words`. The program exits if one is invalid.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if args.resume and args.overwrite:
        parser.error("--resume continues a run and --overwrite replaces it; choose one")
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
                    f"the run in {args.output} was started with --{option} {then}, not {now}; remove --{option} "
                    "to resume it, or name another --output"
                )
    else:
        name = recipe_of(args)
        args = parse_over(parser, [] if name is None else [find_recipe(parser, name, folder)], NOT_SETTINGS, words)
        args.recipe = name
    for key in none_words:
        if getattr(args, key) in (0, "none"):
            setattr(args, key, None)
    for key, value in vars(args).items():
        # Cards and recipes contain all settings, and must be UTF-8.
        if any("\ud800" <= letter <= "\udfff" for letter in str(value)):
            name = str(value).encode("ascii", "backslashreplace").decode()
            parser.error(f"--{key.replace('_', '-')} {name} is not UTF-8; rename it")
    if args.output.resolve() in (Path.cwd(), *Path.cwd().parents):
        parser.error(f"--output {args.output} contains the current folder; name another folder")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; name a folder")
    if args.output.exists() and not (args.output / "config.json").is_file() and any(args.output.iterdir()):
        parser.error(f"--output {args.output} is not empty and not a model folder; name another folder")
    args.words = words
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that are not None or empty, for a recipe."""
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS and value not in (None, [])}
    if "head_kwargs" in settings:
        settings["head_kwargs"] = dict(settings["head_kwargs"])
    return settings


def check_same_settings(args: argparse.Namespace) -> None:
    """Check that all machines have the same settings, which each reads from its own copy of a resumed run.

    Raises:
        InputError: A setting differs, in all processes.
    """
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in OWN_SETTINGS and not str(value).startswith("local-dir:")
    }
    check_same(settings, f"give all machines the same options, or copy {run_folder(args.output)}/recipe.toml to them")


def command_of(program: str, args: argparse.Namespace, processes: int, device: str) -> str:
    """Return the command that reproduces the run."""
    if args.processes is not None:
        options = ["--processes", str(processes), "--recipe", "recipe.toml"] if args.resume else args.words
        return shlex.join(["res2net-zoo", program, *options])
    launch = f"--multi_gpu --num_processes {processes} " if processes > 1 else ""
    cpu = "ACCELERATE_USE_CPU=true " if launch and device == "cpu" else ""
    options = ["--recipe", "recipe.toml"] if args.resume else args.words
    return f"{cpu}accelerate launch {launch}-m res2net_zoo {program} {shlex.join(options)}".strip()
