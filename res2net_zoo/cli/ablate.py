"""Measure what scale, width, cardinality and depth cost and bring.

Usage: res2net-zoo ablate [--only NAME ...] [--depth L ...] [--scale S ...] [--figure FILE] [--output FILE]

It builds every model of the paper's Tables 3 and 4 and Figure 5, or of a grid of your own, counts its parameters and
multiply-accumulates, computes its receptive field and measures its latency on this machine.

Examples:
  res2net-zoo ablate
  res2net-zoo ablate --depth 29 56 --cardinality 6 12 --scale 1 2 4
  res2net-zoo ablate --frame imagenet --width 14 26 --scale 4 8 --device cuda --batch-size 32

Exit codes: 0 done; 2 bad input.
"""

import argparse
from collections.abc import Sequence

from res2net_zoo.analysis import ablate
from res2net_zoo.cli.command import command, parser_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    ablate.add_arguments(parser)
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    return ablate.main(args)
