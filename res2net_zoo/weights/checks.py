"""The result of one check of a model folder."""

from typing import NamedTuple


class Check(NamedTuple):
    """The result of one check.

    Attributes:
        what: What was checked.
        found: The value found.
        expected: The expected value.
        passed: Whether they agree; None if the expected value is unknown.
    """

    what: str
    found: str
    expected: str
    passed: bool | None
