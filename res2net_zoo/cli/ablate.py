"""Compare size, receptive field and latency over scale, width, cardinality and depth.

Usage: res2net-zoo ablate [--only NAME ...] [--depth L ...] [--scale S ...] [--figure FILE] [--output FILE]

It builds every model of the paper's Tables 3 and 4 and Figure 5, or of a custom grid, counts its parameters and
multiply-accumulates, computes its receptive field and measures its latency on this machine.

Examples:
  res2net-zoo ablate
  res2net-zoo ablate --depth 29 56 --cardinality 6 12 --scale 1 2 4
  res2net-zoo ablate --frame imagenet --width 14 26 --scale 4 8 --device cuda --batch-size 32

Exit codes: 0 done; 2 bad input.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from res2net_zoo.analysis.ablate import BASE, PAPER
from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.utils.command_line import within

if TYPE_CHECKING:
    from res2net_zoo.analysis.ablate import Point


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add, whole = parser.add_argument, within(int, 1)
    add("--only", nargs="+", choices=PAPER, help="tables and figures of the paper (default: all)")
    add("--depth", nargs="+", type=whole, metavar="L", help="custom grid: layers")
    add("--cardinality", nargs="+", type=whole, metavar="C", help="custom grid: groups of each 3x3 convolution")
    add("--width", nargs="+", type=whole, metavar="W", help="custom grid: channels of each group of a convolution")
    add("--scale", nargs="+", type=whole, metavar="S", help="custom grid: groups of the hierarchy")
    add("--frame", choices=("cifar", "imagenet"), help="stem and stages of the custom grid (default: cifar)")
    about = "timings of each model, 0 to skip them (default: %(default)s)"
    add("--rounds", type=within(int, 0), default=5, metavar="N", help=about)
    add("--batch-size", type=whole, default=1, metavar="N", help="images per batch (default: %(default)s)")
    add("--device", default="cpu", help="device of the timings, such as cuda (default: %(default)s)")
    add("--figure", type=Path, metavar="FILE", help="plot the results")
    add("--output", type=Path, metavar="FILE", help="write the results as JSON")
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.analysis import ablate

    grid = {key: getattr(args, key) for key in BASE if getattr(args, key)}
    check(args, grid)
    device = ablate.find_device(args.device)

    along = ablate.longest(grid) if grid else ""
    if grid:
        sections = {"grid": list(ablate.of_grid(grid, along, args.frame or "cifar"))}
    else:
        sections = ablate.paper(args.only or PAPER)
    ablate.count_costs([point for section in sections.values() for point in section])
    for section in sections.values() if args.rounds else ():
        ablate.measure_latency(section, args.rounds, args.batch_size, device)

    for name, section in sections.items():
        print(f"{ablate.SECTIONS[name]}\n\n{ablate.table(section, args.batch_size)}\n")
    write(args, sections, along)
    return 0


def check(args: argparse.Namespace, grid: dict[str, list[int]]) -> None:
    """Check that the options are compatible and the files can be written, before minutes of timings."""
    from res2net_zoo.analysis.ablate import check_picture
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_writable_file

    if args.frame and not grid:
        raise InputError("--frame needs a custom grid, such as --scale 2 4")
    if grid and args.only:
        raise InputError(f"--only selects the paper's models; remove it, or --{next(iter(grid))}")
    if args.figure:
        check_picture(args.figure)
    if args.figure and args.output and args.figure.resolve() == args.output.resolve():
        raise InputError(f"--figure and --output are both {args.output}; name two files")
    for path in filter(None, (args.figure, args.output)):
        check_writable_file(path)


def write(args: argparse.Namespace, sections: "dict[str, list[Point]]", along: str) -> None:
    """Write the JSON file and the picture that were asked for."""
    from res2net_zoo.analysis import ablate
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import write_atomically

    points = [point for section in sections.values() for point in section]
    key = f"along {along}" if along else ""
    if "figure5" in sections:
        points = sections["figure5"]
        key = "varied alone, from\n" + ",\n".join(f"{name} {value}" for name, value in BASE.items())
    unwritten = []
    if args.output:
        text = ablate.as_json(sections, args.batch_size, args.device) + "\n"
        try:
            write_atomically(args.output, lambda path: path.write_text(text))
            print(f"as JSON: {args.output}")
        except OSError as error:
            unwritten.append(f"cannot write {args.output}: {error.strerror or error}")
    if args.figure:
        try:
            write_atomically(args.figure, lambda path: ablate.draw(points, path, args.batch_size, key))
        except OSError as error:
            unwritten.append(f"cannot write {args.figure}: {error.strerror or error}")
    if unwritten:
        raise InputError(f"{'; '.join(unwritten)}; the figures are printed above")
    if args.figure:
        print(f"figure: {args.figure}")
