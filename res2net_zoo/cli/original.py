"""Write weights as a .pth file that the authors' code, MMDetection or MMPretrain loads.

Usage: res2net-zoo original NAME [--keys authors|mmdet|mmpretrain] [--output FILE]

For projects with a copy of the authors' code that load its weights from a path, and for OpenMMLab configs. NAME is a
model of the authors' code (res2net50_v1b_26w_4s), its name in the zoo (res2net50d), or a trained model (local-dir:DIR,
hf-hub:ORG/NAME). Published weights are downloaded and verified, or read from the cache or the mirror. The output is
reproducible.

Examples:
  res2net-zoo original res2net50_v1b_26w_4s --output lib/res2net50_v1b_26w_4s-3cf99910.pth
  res2net-zoo original local-dir:output --output finetuned.pth
  res2net-zoo original res2net101_v1d_26w_4s.mmdet_htc_coco --keys mmdet --output htc_backbone.pth

Exit codes: 0 done; 2 bad input.
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from res2net_zoo.cli.command import command, parser_of

if TYPE_CHECKING:
    import torch


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("name", metavar="NAME", help="model, by the authors' name or as for timm.create_model")
    parser.add_argument(
        "--keys",
        choices=("authors", "mmdet", "mmpretrain"),
        default="authors",
        help="naming of the tensors; mmdet writes no classifier (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: the original file's name, in the current folder)",
    )
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.utils.files import check_writable_file
    from res2net_zoo.weights.authors import original_file_name, save_state_dict

    name, state_of = prepare(args)
    output = args.output or Path(original_file_name(name))
    check_writable_file(output)
    state = state_of()
    save_state_dict(state, output)
    has_classifier = any("fc." in key for key in state)
    note = "" if has_classifier or args.keys == "mmdet" else ", without a classifier (strict=False)"
    print(f"{output}: {len(state)} tensors under the keys of {OWNERS[args.keys]}{note}")
    return 0


OWNERS = {"authors": "the authors", "mmdet": "MMDetection", "mmpretrain": "MMPretrain"}


def prepare(args: argparse.Namespace) -> "tuple[str, Callable[[], OrderedDict[str, torch.Tensor]]]":
    """Check the name of a model; return the zoo's name of it, and what loads its weights under the chosen keys."""
    from res2net_zoo.utils.console import warn
    from res2net_zoo.weights import authors, layouts
    from res2net_zoo.weights.pretrained import create_model

    if args.keys == "authors":
        name = authors.zoo_name(args.name)
        return name, lambda: authors.authors_state_dict(create_model(name), args.name)
    name = authors.ARCHITECTURES.get(args.name, args.name)

    def renamed() -> "OrderedDict[str, torch.Tensor]":
        model = create_model(name)
        state = layouts.to_layout(model.state_dict(), args.keys)
        if doubt := layouts.wiring_doubt(model, args.keys):
            warn(f"{args.name}: {doubt}")
        return state

    return name, renamed
