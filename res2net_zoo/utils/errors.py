"""The error for bad input, and functions that shorten the messages of other errors."""

import re

LONGEST = 300  # characters quoted from the message of another error


class InputError(Exception):
    """Bad input; the message is one line with the problem and how to fix it.

    Args:
        message: The line. It is complete without the names of options, which programs add.
        *parameters: Names of the parameters to change, as in the library's functions and settings.

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
        limit: Maximum number of characters before " ...".
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return clipped(re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text), limit)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, shortened; compilers and runtimes may write pages."""
    lines = str(error).strip().splitlines()
    return clipped(lines[0]) if lines else type(error).__name__


def clipped(text: str, limit: int = LONGEST) -> str:
    """Return a text, truncated to `limit` characters and " ..." if it is longer."""
    return text if len(text) <= limit else f"{text[:limit]} ..."
