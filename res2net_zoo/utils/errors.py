"""Errors for bad input, and what messages quote of the errors of others."""

import re

LONGEST = 300  # characters that a message quotes of another one


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do.

    Args:
        message: The line. It is complete without the names of options, which programs add.
        *parameters: Names of the parameters to change, as the library's functions and settings have them.

    Attributes:
        parameters: Those names.
    """

    def __init__(self, message: str = "", *parameters: str) -> None:
        super().__init__(message)
        self.parameters = parameters


def one_line(error: BaseException, limit: int = LONGEST) -> str:
    """Return the text of an error on one line of limited length, without credentials and queries of URLs.

    Args:
        error: Any error; one without text is named by its type.
        limit: Most characters to return before " ...".
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return clipped(re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text), limit)


def first_line(error: BaseException, limit: int = LONGEST) -> str:
    """Return the first line of an error's text, as `one_line`; those of compilers and runtimes can be pages."""
    lines = str(error).strip().splitlines()
    return clipped(lines[0], limit) if lines else type(error).__name__


def clipped(text: str, limit: int = LONGEST) -> str:
    """Return a text, shortened to its first `limit` characters and " ..." where it is longer."""
    return text if len(text) <= limit else f"{text[:limit]} ..."
