"""JSON results that a program writes after each step."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import write_atomically


class ResultsFile:
    """A JSON file that is rewritten after each step; an error while writing does not stop the next steps.

    Args:
        path: The file, or None to write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._error: OSError | None = None

    def write(self, results: list[dict[str, Any]]) -> None:
        """Write all results so far; an error is kept for `check`."""
        if self.path is None:
            return
        self._error = None
        text = json.dumps(results, indent=2) + "\n"
        try:
            write_atomically(self.path, partial(Path.write_text, data=text))
        except OSError as error:
            self._error = error

    def check(self, elsewhere: str) -> None:
        """Check that the results were written.

        Args:
            elsewhere: Where else the results are, for the error message.

        Raises:
            InputError: The last call of `write` failed.
        """
        if self._error is not None:
            reason = self._error.strerror or self._error
            raise InputError(f"cannot write {self.path}: {reason}; the results are {elsewhere}")
