"""List models and checkpoints with size, accuracy, licence and publisher.

Usage: res2net-zoo list [PATTERN ...] [--pretrained] [--license TEXT] [--max-params M] [--min-top1 P]

Examples:
  res2net-zoo list
  res2net-zoo list 'res2net50*' --pretrained
  res2net-zoo list --license apache --min-top1 80 --max-gmacs 9

Exit codes: 0 done; 2 bad input.
"""

import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path

from res2net_zoo import catalog
from res2net_zoo.catalog import Architecture, Checkpoint
from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.utils.command_line import within
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.markdown import markdown_table, update_between

# The table is between these two lines of a file.
MARKS = ("<!-- models: python -m res2net_zoo list --update docs/models.md -->", "<!-- end of models -->")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("pattern", nargs="*", metavar="PATTERN", help="names to list, such as 'res2net50*' or '*.in1k' (default: all)")
    add("--pretrained", action="store_true", help="only checkpoints, not models without weights")
    add("--license", metavar="TEXT", help="only checkpoints whose licence contains TEXT, in any case")
    add("--released-by", metavar="TEXT", help="only checkpoints whose publisher contains TEXT, in any case")
    add("--max-params", type=within(float, 0), metavar="M", help="at most M million parameters")
    add("--max-gmacs", type=within(float, 0), metavar="G", help="at most G GMACs per image")
    add("--min-top1", type=within(float, 0, 100), metavar="P", help="at least P percent top-1 on ImageNet-1k")
    add("--update", type=Path, help="update the table in FILE between its marker lines")
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    if args.update is None:
        print(listing(args))
        return 0
    if filtered(args):
        raise InputError("--update writes the whole table and takes no filters")
    update_between(args.update, listing(args), MARKS)
    return 0


def filtered(args: argparse.Namespace) -> bool:
    """Return whether the arguments contain a filter."""
    filters = (args.pattern, args.pretrained, args.license, args.released_by)
    return any(filters) or any(limit is not None for limit in (args.max_params, args.max_gmacs, args.min_top1))


def listing(args: argparse.Namespace) -> str:
    """Return the table of `list`."""
    rows = [row(*entry) for entry in catalog.load().entries() if wanted(*entry, args)]
    table = markdown_table(("name", "params (M)", "GMACs", "at", "top-1", "licence", "from"), rows)
    if any("*" in entry[5] for entry in rows):
        table += (
            "\n\n\\* The licence of the release's code. `show NAME` prints what the release states about the weights."
        )
    return table if rows else "no model matches"


def imagenet_top1(checkpoint: Checkpoint | None) -> float | None:
    """Return a checkpoint's published ImageNet top-1, if there is one."""
    accuracy = checkpoint.imagenet_accuracy if checkpoint else None
    return accuracy.top1 if accuracy else None


def wanted(architecture: Architecture, checkpoint: Checkpoint | None, args: argparse.Namespace) -> bool:
    """Return whether an entry matches the filters of `list`."""
    if checkpoint is None and (args.pretrained or args.license or args.released_by or args.min_top1):
        return False
    names = [architecture.name] + ([checkpoint.name] if checkpoint else [])
    license, released_by = (checkpoint.license, checkpoint.released_by) if checkpoint else ("", "")
    return (
        (not args.pattern or any(fnmatch.fnmatch(name, pattern) for name in names for pattern in args.pattern))
        and (args.license or "").lower() in license.lower()
        and (args.released_by or "").lower() in released_by.lower()
        and (args.max_params is None or architecture.parameters <= args.max_params * 1e6)
        and (args.max_gmacs is None or architecture.macs <= args.max_gmacs * 1e9)
        and (args.min_top1 is None or (imagenet_top1(checkpoint) or 0) >= args.min_top1)
    )


def row(architecture: Architecture, checkpoint: Checkpoint | None) -> list[str]:
    """Return an entry's row of `list`."""
    top1 = imagenet_top1(checkpoint)
    return [
        checkpoint.name if checkpoint else architecture.name,
        f"{architecture.parameters / 1e6:.3f}",
        f"{architecture.macs / 1e9:.2f}",
        str(architecture.input_size[1]),
        f"{top1:.3f}" if top1 is not None else "-",
        (checkpoint.license + ("*" if checkpoint.license_note else "")) if checkpoint else "-",
        "; ".join(origin(checkpoint)) if checkpoint else "no weights here",
    ]


def origin(checkpoint: Checkpoint) -> list[str]:
    """Return who released a checkpoint, its repository on the Hub, and the results of models whose backbone it is."""
    hub = [f"Hub {checkpoint.hub_id}"] if checkpoint.hub_id else []
    return [checkpoint.released_by, *hub, *(f"backbone of {x.model}: {x.text}" for x in checkpoint.downstream)]
