"""The catalogue on the command line: `python -m res2net_zoo list`, `show NAME`, `sizes` and `ablate`."""

import argparse
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path

from res2net_zoo import catalog
from res2net_zoo.analysis import ablate
from res2net_zoo.catalog import Architecture, Checkpoint, Printed
from res2net_zoo.models import dla, res2net
from res2net_zoo.utils.command_line import Parser, within
from res2net_zoo.utils.console import nearest, run
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import write_atomically
from res2net_zoo.utils.markdown import markdown_table

# Between these two lines a file has the table of a command.
MARKS = {
    "list": ("<!-- models: python -m res2net_zoo list --update docs/models.md -->", "<!-- end of models -->"),
    "sizes": ("<!-- sizes: python -m res2net_zoo sizes --update docs/models.md -->", "<!-- end of sizes -->"),
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog="python -m res2net_zoo", description="What the zoo has, and where each weight is from.")
    commands = parser.add_subparsers(dest="command", required=True, prog="python -m res2net_zoo")
    listing = commands.add_parser("list", help="a table of all models and checkpoints")
    listing.add_argument("pattern", nargs="*", help="names to list, such as 'res2net50*' or '*.in1k'")
    listing.add_argument("--pretrained", action="store_true", help="only what has weights")
    listing.add_argument("--license", metavar="TEXT", help="only weights whose licence has TEXT in it")
    listing.add_argument("--released-by", metavar="TEXT", help="only weights released by TEXT")
    listing.add_argument("--max-params", type=within(float, 0), metavar="M", help="at most M million parameters")
    listing.add_argument("--max-gmacs", type=within(float, 0), metavar="G", help="at most G GMACs an image")
    listing.add_argument(
        "--min-top1", type=within(float, 0, 100), metavar="P", help="at least P percent top-1 on ImageNet"
    )
    show = commands.add_parser("show", help="all that is known of a model or checkpoint")
    show.add_argument("name", metavar="NAME", help="such as res2net50_26w_4s or res2net50_26w_4s.in1k")
    sizes = commands.add_parser("sizes", help="parameters and GMACs, and what publications print of them")
    for command in (listing, sizes):
        command.add_argument("--update", type=Path, metavar="FILE", help="put the table into FILE, between its marks")
    ablation = commands.add_parser("ablate", help="what scale, width, cardinality and depth cost and bring")
    ablate.add_arguments(ablation)
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """Run a command; return its exit code."""
    if args.command == "ablate":
        return ablate.main(args)
    if args.command == "show":
        print(show(args.name))
        return 0
    if args.update and args.command == "list" and filtered(args):
        raise InputError("--update writes the whole table; leave the filters out")
    table = listing(args) if args.command == "list" else sizes()
    if args.update is None:
        print(table)
    else:
        update(args.update, table, MARKS[args.command])
    return 0


def filtered(args: argparse.Namespace) -> bool:
    """Tell whether `list` is asked for a part of its table."""
    filters = (args.pattern, args.pretrained, args.license, args.released_by)
    return any(filters) or any(limit is not None for limit in (args.max_params, args.max_gmacs, args.min_top1))


def listing(args: argparse.Namespace) -> str:
    """Return the table of `list`."""
    rows = [row(*entry) for entry in entries() if wanted(*entry, args)]
    table = markdown_table(("name", "params (M)", "GMACs", "at", "top-1", "licence", "from"), rows)
    if any("*" in entry[5] for entry in rows):
        table += (
            "\n\n\\* The licence of the release's code. `show NAME` prints what the release states about the weights."
        )
    return table if rows else "nothing fits"


def sizes() -> str:
    """Return the table of `sizes`: every model's, beside what publications print, and why that differs."""
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
        str(architecture.input_size[1]),
        f"{top1:.3f}" if top1 is not None else "-",
        (checkpoint.license + ("*" if checkpoint.license_note else "")) if checkpoint else "-",
        (f"{checkpoint.released_by}; Hub {checkpoint.hub_id}" if checkpoint.hub_id else checkpoint.released_by)
        if checkpoint
        else "no weights here",
    ]


def show(name: str) -> str:
    """Return all that is known of a model or checkpoint.

    Args:
        name: `arch` or `arch.tag`; for `arch` the authors' own names will do too.

    Raises:
        InputError: The catalogue has no such entry.
    """
    everything = catalog.load()
    name = {**res2net.AUTHORS_NAMES, **dla.AUTHORS_NAMES}.get(name, name)
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
    facts += [("printed", f"{describe(p)} ({p.source})") for p in architecture.printed]
    facts += [("difference", architecture.difference)] if architecture.difference else []
    if checkpoint is None:
        return "\n".join(f"{key:15}{value}" for key, value in [*facts, ("weights", "none in the catalogue")])
    others = [
        c.name for c in everything.checkpoints.values() if c.architecture == architecture.name and c is not checkpoint
    ]
    sha256 = checkpoint.sha256 or "unknown"
    if 0 < len(checkpoint.sha256) < 64:
        sha256 += " ... (as far as its release gives it)"
    facts += [
        ("released by", checkpoint.released_by),
        ("original", f"{checkpoint.url or 'no direct download'} ({checkpoint.format})"),
        ("SHA-256", sha256),
        ("Hub", checkpoint.hub_id + (f", SHA-256 {checkpoint.hub_sha256}" if checkpoint.hub_sha256 else "") or "-"),
        ("licence", checkpoint.license + (f" ({checkpoint.license_note})" if checkpoint.license_note else "")),
        (
            "preprocessing",
            f"{'x'.join(map(str, checkpoint.input_size))}, crop {checkpoint.crop_pct}, {checkpoint.interpolation}, "
            f"mean {checkpoint.mean}, std {checkpoint.std}",
        ),
        ("classes", str(checkpoint.num_classes)),
    ]
    facts += [("derives from", checkpoint.base_model)] if checkpoint.base_model else []
    facts += [("notes", checkpoint.notes)] if checkpoint.notes else []
    facts += [("also", ", ".join(others))] if others else []
    table = markdown_table(
        ("measured on", "split", "top-1", "top-5", "source"),
        [(a.dataset, a.split, f"{a.top1:.3f}", f"{a.top5:.3f}", a.source) for a in checkpoint.accuracies],
    )
    return "\n".join(f"{key:15}{value}" for key, value in facts) + f"\n\n{table}"


def describe(printed: Printed) -> str:
    """Return what a publication prints of a model, in words."""
    units = {
        "parameters": "{} M parameters",
        "gmacs": "{} GMACs",
        "runtime_ms": "{} ms",
        "top1_error": "{} % top-1 error",
    }
    return ", ".join(unit.format(text) for name, unit in units.items() if (text := getattr(printed, name)))


def update(path: Path, table: str, marks: tuple[str, str]) -> None:
    """Put a table into a file, between its marks.

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


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(run(lambda: main(arguments)))
