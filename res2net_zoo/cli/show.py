"""Show all facts about a model or checkpoint.

Usage: res2net-zoo show NAME

Examples:
  res2net-zoo show res2net50_26w_4s
  res2net-zoo show res2net50_26w_4s.mindcv_in1k

Exit codes: 0 done; 2 bad input.
"""

import argparse
from collections.abc import Sequence

from res2net_zoo import catalog
from res2net_zoo.catalog import Checkpoint, Printed
from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.utils.console import nearest
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.markdown import markdown_table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("name", metavar="NAME", help="arch or arch.tag, as `res2net-zoo list` prints them")
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    print(show(args.name))
    return 0


def show(name: str) -> str:
    """Return all facts about a model or checkpoint.

    Args:
        name: `arch` or `arch.tag`; for `arch`, the authors' names are also accepted.

    Raises:
        InputError: The catalogue has no such entry.
    """
    from res2net_zoo.weights.authors import ARCHITECTURES

    everything = catalog.load()
    name = ARCHITECTURES.get(name, name)
    architecture = everything.architectures.get(name.split(".")[0])
    checkpoint = everything.checkpoint(name)
    if architecture is None or ("." in name and checkpoint is None):
        raise InputError(
            f"the catalogue has no {name}; {nearest(name, [*everything.architectures, *everything.checkpoints])}"
        )
    facts = [
        ("name", checkpoint.name if checkpoint else architecture.name),
        ("model", architecture.title),
        ("parameters", f"{architecture.parameters:,} with {architecture.num_classes:,} classes"),
        ("GMACs", f"{architecture.macs / 1e9:.3f} at {'x'.join(map(str, architecture.input_size))}"),
    ]
    facts += [("printed", f"{printed_figures(p)} ({p.source})") for p in architecture.printed]
    facts += [("difference", architecture.difference)] if architecture.difference else []
    if checkpoint is None:
        return "\n".join(f"{key:15}{value}" for key, value in [*facts, ("weights", "none in the catalogue")])
    others = [
        c.name for c in everything.checkpoints.values() if c.architecture == architecture.name and c is not checkpoint
    ]
    sha256 = checkpoint.sha256 or "unknown"
    if 0 < len(checkpoint.sha256) < 64:
        sha256 += " ... (only the published digits)"
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
        ("classes", str(checkpoint.num_classes or "none: a backbone without a classifier")),
    ]
    facts += [("derives from", checkpoint.base_model)] if checkpoint.base_model else []
    facts += [("notes", checkpoint.notes)] if checkpoint.notes else []
    facts += [("also", ", ".join(others))] if others else []
    return "\n".join(f"{key:15}{value}" for key, value in facts) + f"\n\n{results(checkpoint)}"


def results(checkpoint: Checkpoint) -> str:
    """Return the table of a checkpoint's accuracies, or of the results of the larger models whose backbone it is."""
    if checkpoint.downstream:
        rows = [(x.model, x.dataset, x.text, x.source) for x in checkpoint.downstream]
        return markdown_table(("backbone of", "measured on", "result", "source"), rows)
    return markdown_table(
        ("measured on", "split", "top-1", "top-5", "source"),
        [(a.dataset, a.split, f"{a.top1:.3f}", f"{a.top5:.3f}", a.source) for a in checkpoint.accuracies],
    )


def printed_figures(printed: Printed) -> str:
    """Return the figures of a model in a publication, with units."""
    units = {
        "parameters": "{} M parameters",
        "gmacs": "{} GMACs",
        "runtime_ms": "{} ms",
        "top1_error": "{} % top-1 error",
    }
    return ", ".join(unit.format(text) for name, unit in units.items() if (text := getattr(printed, name)))
