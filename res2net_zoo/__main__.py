"""The catalogue on the command line: `python -m res2net_zoo list` and `show NAME`."""

import argparse
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from res2net_zoo import catalog
from res2net_zoo.catalog import Architecture, Checkpoint
from res2net_zoo.program import InputError, markdown_table, nearest, run, write_atomically

MARKS = ("<!-- models: python -m res2net_zoo list --update README.md -->", "<!-- end of models -->")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    quiet: dict[str, Any] = {"usage": argparse.SUPPRESS}  # so that a wrong argument is told in one line
    parser = argparse.ArgumentParser(
        prog="python -m res2net_zoo", description="What the zoo has, and where each weight is from.", **quiet
    )
    commands = parser.add_subparsers(dest="command", required=True, prog="python -m res2net_zoo")
    listing = commands.add_parser("list", help="a table of all models and checkpoints", **quiet)
    listing.add_argument("pattern", nargs="*", help="names to list, such as 'res2net50*' or '*.in1k'")
    listing.add_argument("--pretrained", action="store_true", help="only what has weights")
    listing.add_argument("--license", metavar="TEXT", help="only weights whose licence has TEXT in it")
    listing.add_argument("--released-by", metavar="TEXT", help="only weights released by TEXT")
    listing.add_argument("--max-params", type=float, metavar="M", help="at most M million parameters")
    listing.add_argument("--max-gmacs", type=float, metavar="G", help="at most G GMACs an image")
    listing.add_argument("--min-top1", type=float, metavar="P", help="at least P percent top-1 on ImageNet")
    listing.add_argument("--update", type=Path, metavar="FILE", help="put the table into FILE, between its marks")
    show = commands.add_parser("show", help="all that is known of a model or checkpoint", **quiet)
    show.add_argument("name", metavar="NAME", help="such as res2net50_26w_4s or res2net50_26w_4s.in1k")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """Run a command; return its exit code."""
    if args.command == "show":
        print(show(args.name))
        return 0
    rows = [row(*entry) for entry in entries() if wanted(*entry, args)]
    header = ("name", "params (M)", "GMACs", "top-1", "licence", "from")
    table = markdown_table(header, rows)
    if any("*" in entry[4] for entry in rows):
        table += "\n\n\\* So the release licenses its code; what it says of the weights, `show NAME` tells."
    if args.update is None:
        print(table if rows else "nothing fits")
    else:
        update(args.update, table)
    return 0


def entries() -> Iterator[tuple[Architecture, Checkpoint | None]]:
    """Yield every architecture with each of its checkpoints, or with None if it has no weights."""
    everything = catalog.load()
    for architecture in everything.architectures.values():
        checkpoints = [c for c in everything.checkpoints.values() if c.architecture == architecture.name]
        yield from ((architecture, checkpoint) for checkpoint in checkpoints)
        if not checkpoints:
            yield architecture, None


def imagenet_top1(checkpoint: Checkpoint | None) -> float | None:
    """Return a checkpoint's first published ImageNet top-1, if there is one."""
    accuracies = checkpoint.accuracies if checkpoint else ()
    return next((a.top1 for a in accuracies if a.dataset == "imagenet-1k"), None)


def wanted(architecture: Architecture, checkpoint: Checkpoint | None, args: argparse.Namespace) -> bool:
    """Tell whether an entry passes the filters of `list`."""
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
        f"{top1:.3f}" if top1 is not None else "-",
        (checkpoint.license + ("*" if checkpoint.license_note else "")) if checkpoint else "-",
        (f"{checkpoint.released_by}; Hub {checkpoint.hub_id}" if checkpoint.hub_id else checkpoint.released_by)
        if checkpoint
        else "no weights",
    ]


def show(name: str) -> str:
    """Return all that is known of a model or checkpoint.

    Args:
        name: `arch` or `arch.tag`.

    Raises:
        InputError: The catalogue has no such entry.
    """
    everything = catalog.load()
    architecture = everything.architectures.get(name.split(".")[0])
    checkpoint = everything.checkpoint(name)
    if architecture is None or ("." in name and checkpoint is None):
        raise InputError(
            f"the catalogue has no {name}; {nearest(name, [*everything.architectures, *everything.checkpoints])}"
        )
    facts = [
        ("name", checkpoint.name if checkpoint else architecture.name),
        ("model", architecture.title),
        ("parameters", f"{architecture.parameters:,}"),
        ("GMACs", f"{architecture.macs / 1e9:.3f} at {'x'.join(map(str, architecture.input_size))}"),
    ]
    if checkpoint is None:
        return "\n".join(f"{key:14}{value}" for key, value in [*facts, ("weights", "none published")])
    others = [
        c.name for c in everything.checkpoints.values() if c.architecture == architecture.name and c is not checkpoint
    ]
    sha256 = checkpoint.sha256 or "unknown"
    if 0 < len(checkpoint.sha256) < 64:
        sha256 += " ... (as far as its release gives it)"
    facts += [
        ("released by", checkpoint.released_by),
        ("original", f"{checkpoint.url} ({checkpoint.format})"),
        ("SHA-256", sha256),
        ("Hub", checkpoint.hub_id or "-"),
        ("licence", checkpoint.license + (f" ({checkpoint.license_note})" if checkpoint.license_note else "")),
        (
            "preprocessing",
            f"{'x'.join(map(str, checkpoint.input_size))}, crop {checkpoint.crop_pct}, {checkpoint.interpolation}, "
            f"mean {checkpoint.mean}, std {checkpoint.std}",
        ),
        ("classes", str(checkpoint.num_classes)),
    ]
    facts += [("notes", checkpoint.notes)] if checkpoint.notes else []
    facts += [("also", ", ".join(others))] if others else []
    table = markdown_table(
        ("measured on", "split", "top-1", "top-5", "source"),
        [(a.dataset, a.split, f"{a.top1:.3f}", f"{a.top5:.3f}", a.source) for a in checkpoint.accuracies],
    )
    return "\n".join(f"{key:14}{value}" for key, value in facts) + f"\n\n{table}"


def update(path: Path, table: str) -> None:
    """Put a table into a file, between its marks.

    Raises:
        InputError: The file cannot be read or has no marks.
    """
    try:
        before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
        _, after = rest.split(MARKS[1])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} does not have these two lines once each: {MARKS[0]} {MARKS[1]}") from error
    write_atomically(
        path, lambda new: new.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")
    )


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(run(lambda: main(arguments)))
