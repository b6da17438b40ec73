"""Tables and text in Markdown."""

import re
from collections.abc import Sequence
from pathlib import Path

from res2net_zoo.utils.command_line import printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import write_atomically


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table that reads well as text and as Markdown; columns of figures are right-aligned.

    Args:
        header: Name of each column.
        rows: Cells; the text of each is what `str` makes of it, on one line and with control characters escaped.
    """
    header, *cells = ([table_cell(cell) for cell in row] for row in [header, *rows])
    widths = [max([3, *(len(row[i]) for row in [list(header), *cells])]) for i in range(len(header))]
    right = [all(row[i][:1].isdigit() or row[i] == "-" for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w - 1)}:" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join(line(row) for row in [list(header), rule, *cells])


def table_cell(value: object) -> str:
    """Return the text of a Markdown table's cell, which a vertical bar would end."""
    return printable(value).replace("|", "\\|")


def markdown(text: object) -> str:
    """Return text from a file as Markdown that shows it literally: no markup, links or HTML, on one line."""
    return re.sub(r"[\\`*<&~$]|\](?=[(\[:])|^[#>+=-]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text))


def code_span(text: object) -> str:
    """Return text from a file as a Markdown code span, which shows it literally, on one line."""
    words = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    space = " " * (len(fence) > 1)
    return f"{fence}{space}{words}{space}{fence}"


def update_between(path: Path, table: str, marks: tuple[str, str]) -> None:
    """Write a table into a file, between two lines.

    Raises:
        InputError: The file cannot be read or has no marks.
    """
    try:
        before, rest = path.read_text(encoding="utf-8").split(marks[0])
        _, after = rest.split(marks[1])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} does not have these two lines once each: {marks[0]} {marks[1]}") from error
    write_atomically(
        path, lambda new: new.write_text(f"{before}{marks[0]}\n{table}\n{marks[1]}{after}", encoding="utf-8")
    )
