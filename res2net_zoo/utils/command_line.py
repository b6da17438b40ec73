"""Argument parser with one-line errors that suggest similar options and values.

It imports only the standard library, so that `--help` is fast.
"""

import argparse
import copy
import difflib
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def printable(text: object) -> str:
    """Return text on one line, with control and unprintable characters as escape sequences.

    Messages quote names and values from files, whose control characters would reach the terminal.

    Args:
        text: Any object; `str` makes its text.
    """
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in words)


def closest(name: str, names: Iterable[str], number: int = 3) -> list[str]:
    """Return the names most similar to a name, ignoring case: first those that start with it, in their order.

    Args:
        name: The unknown name.
        names: The known names.
        number: Maximum number of names to return.
    """
    wanted = name[:100].lower()  # comparing takes quadratic time
    by_lower: dict[str, str] = {}
    for other in names:
        by_lower.setdefault(other.lower(), other)
    if wanted in by_lower:
        return [by_lower[wanted]]
    longer = [other for other in by_lower if len(wanted) > 2 and other.startswith(wanted)]
    similar = difflib.get_close_matches(wanted, by_lower, n=number)
    ratio = {other: difflib.SequenceMatcher(None, wanted, other).ratio() for other in similar}
    similar = [other for other in similar if ratio[other] > ratio[similar[0]] - 0.1]
    return [by_lower[other] for other in dict.fromkeys([*longer, *similar])][:number]


def did_you_mean(name: str, names: Iterable[str], otherwise: str, number: int = 3) -> str:
    """Return `did you mean ...?` with the names most similar to a name, or `otherwise` if none is similar."""
    close = closest(name, names, number)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def within(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite int or float between `low` and `high`, inclusive."""

    def parse(text: str) -> float:
        number = kind(text)
        finite = not isinstance(number, float) or math.isfinite(number)  # integers may be too large for a float
        if not (finite and low <= number <= high):
            bounds = f"{low} or more" + (f", up to {high}" if high < math.inf else "" if finite else " and finite")
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return number

    parse.__name__ = kind.__name__  # argparse prints it if the text is not a number
    return parse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks of descriptions, prints defaults as typed in a shell, and derives metavars from types."""

    def _expand_help(self, action: argparse.Action) -> str:
        if isinstance(action.default, list | tuple):
            action = copy.copy(action)
            action.default = shlex.join(
                f"{value:g}" if isinstance(value, float) else str(value) for value in action.default
            )
        return super()._expand_help(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = action.type
        name = getattr(kind, "__name__", "")
        return "FILE" if kind is Path else {"int": "N", "float": "X"}.get(name, "NAME")


class Parser(argparse.ArgumentParser):
    """A parser that prints errors on one line, with a suggestion for misspelled options and values.

    Attributes:
        source: Prefix of errors: the origin of the arguments, if not the command line.
    """

    source = ""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"usage": argparse.SUPPRESS, "formatter_class": HelpFormatter, **kwargs})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse arguments as argparse does, but report unknown options before missing ones."""
        words = list(sys.argv[1:] if args is None else args)
        options = list(self._option_string_actions)
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.partition("=")[0]
            known = any(option.startswith(name) for option in options)
            if word.startswith("--") and not known and " " not in word:  # a word with a space is a value
                self._refuse(name, options)
        known_args, rest = super().parse_known_args(words, namespace)
        if rest:
            self._refuse(rest[0].partition("=")[0], options)
        return known_args, rest

    def _refuse(self, word: str, options: Iterable[str]) -> None:
        self.error(f"unrecognized argument {word}; {did_you_mean(word, options, '--help lists all options')}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), choices, f"choose from {', '.join(choices)}")
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}")

    def error(self, message: str) -> Any:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {printable(self.source + message)}\n")
