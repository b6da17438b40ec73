"""List parameters and GMACs of every model next to the published values.

Usage: res2net-zoo sizes [--update FILE]

Examples:
  res2net-zoo sizes
  res2net-zoo sizes --update docs/models.md

Exit codes: 0 done; 2 bad input.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from res2net_zoo import catalog
from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.utils.markdown import markdown_table, update_between

# The table is between these two lines of a file.
MARKS = ("<!-- sizes: python -m res2net_zoo sizes --update docs/models.md -->", "<!-- end of sizes -->")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--update", type=Path, help="update the table in FILE between its marker lines")
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    if args.update is None:
        print(sizes())
    else:
        update_between(args.update, sizes(), MARKS)
    return 0


def sizes() -> str:
    """Return the table of `sizes`: counted and published sizes of every model, and why they differ."""
    rows = []
    reasons: list[str] = []
    for a in catalog.load().architectures.values():
        sources = dict.fromkeys(p.source for p in a.printed if p.parameters or p.gmacs)
        printed = [
            " / ".join(dict.fromkeys(getattr(p, name) for p in a.printed if getattr(p, name))) or "-"
            for name in ("parameters", "gmacs")
        ]
        if a.difference and a.difference not in reasons:
            reasons.append(a.difference)
        differs = f"yes ({1 + reasons.index(a.difference)})" if a.difference else "no" if sources else "-"
        size = [f"{a.parameters / 1e6:.3f}", f"{a.macs / 1e9:.3f}", str(a.input_size[1])]
        rows.append([a.name, a.title, *size, *printed, "; ".join(sources) or "-", differs])
    header = ("name", "what", "params (M)", "GMACs", "at", "printed params", "printed GMACs", "printed in", "differs")
    return "\n".join([markdown_table(header, rows), "", *(f"{i}. {text}." for i, text in enumerate(reasons, 1))])
