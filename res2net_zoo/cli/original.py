"""Write weights as a .pth file that the authors' code loads.

Usage: res2net-zoo original NAME [--output FILE]

For projects that hold a copy of the authors' file and load its weights from a path. NAME is a model of the authors'
code (res2net50_v1b_26w_4s), the zoo's name of it (res2net50d), or a trained one (local-dir:DIR, hf-hub:ORG/NAME).
Published weights are downloaded and verified, or read from the cache or the mirror. The same weights result in the
same bytes.

Examples:
  res2net-zoo original res2net50_v1b_26w_4s --output lib/res2net50_v1b_26w_4s-3cf99910.pth
  res2net-zoo original local-dir:output --output finetuned.pth

Exit codes: 0 done; 2 bad input.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from res2net_zoo.cli.command import command, parser_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("name", metavar="NAME", help="model, by the authors' name or as for timm.create_model")
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
    from res2net_zoo.weights import authors
    from res2net_zoo.weights.pretrained import create_model

    name = authors.zoo_name(args.name)
    output = args.output or Path(authors.original_file_name(name))
    check_writable_file(output)
    state = authors.authors_state_dict(create_model(name), args.name)
    authors.save_state_dict(state, output)
    has_classifier = "" if any(key.startswith("fc.") for key in state) else ", without a classifier (strict=False)"
    print(f"{output}: {len(state)} tensors under the authors' keys{has_classifier}")
    return 0
