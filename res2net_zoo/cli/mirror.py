"""Download checkpoints to a folder for offline use.

Usage: res2net-zoo mirror --to DIR [--model NAME ...]

With `RES2NET_ZOO_MIRROR=DIR` set, `pretrained=True` reads from DIR. After an interruption, run it again to resume.

Examples:
  res2net-zoo mirror --to mirror
  res2net-zoo mirror --to mirror --model res2net50_26w_4s res2net101d.mindcv_in1k

Exit codes: 0 done; 2 bad input, or checkpoints are missing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from res2net_zoo.cli.command import command, parser_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--to", required=True, type=Path, metavar="DIR", help="the mirror, created if it does not exist"
    )
    parser.add_argument(
        "--model",
        nargs="+",
        help="checkpoints, as arch.tag, or arch for its default (default: all that can be downloaded)",
    )
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

    from res2net_zoo import catalog
    from res2net_zoo.hub.mirror import locked, mirror
    from res2net_zoo.utils.console import progress_bar, report
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.markdown import markdown_table

    checkpoints = catalog.choose(args.model)
    if not args.model:
        for checkpoint in [c for c in checkpoints if not c.url and not c.hub_id and not (args.to / c.name).is_dir()]:
            checkpoints.remove(checkpoint)
            print(f"{checkpoint.name} is skipped: {checkpoint.notes}")
    rows, failed = [], []
    with locked(args.to):
        for checkpoint in progress_bar(None, checkpoints, desc="mirror"):
            try:
                origin = mirror(checkpoint, args.to)
            except InputError as error:
                if len(checkpoints) > 1:
                    report(error)
                failed.append((checkpoint.name, error))
                continue
            size = (args.to / checkpoint.name / WEIGHTS).stat().st_size
            rows.append((checkpoint.name, f"{size / 1e6:.1f}", checkpoint.license, origin))
    if rows:
        print(markdown_table(("checkpoint", "MB", "licence", "from"), rows))
    if failed and len(checkpoints) == 1:
        raise failed[0][1]
    if failed:
        names = ", ".join(name for name, _ in failed)
        raise InputError(f"{len(failed)} of {len(checkpoints)} are missing ({names}); run it again to resume")
    print(f"set RES2NET_ZOO_MIRROR={args.to.resolve()} for pretrained=True to read from there")
    return 0
