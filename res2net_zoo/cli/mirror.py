"""Download checkpoints to a folder for offline use.

Usage: res2net-zoo mirror --to DIR [--model NAME ...] [--public-key KEY]

With `RES2NET_ZOO_MIRROR=DIR` set, `pretrained=True` reads from DIR. After an interruption, run it again to resume. With
--public-key, repositories that are not signed by that key are refused.

Examples:
  res2net-zoo mirror --to mirror
  res2net-zoo mirror --to mirror --model res2net50_26w_4s res2net101d.mindcv_in1k
  res2net-zoo mirror --to mirror --model res2net50_26w_4s --public-key key.pub

Exit codes: 0 done; 1 a signature is missing or wrong; 2 bad input, or checkpoints are missing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.keys import add_trust, check_trust, trust_of


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
    add_trust(parser.add_argument, "refuse what is not signed")
    args = parser.parse_args(argv)
    check_trust(parser, args)
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

    from res2net_zoo import catalog
    from res2net_zoo.hub.mirror import locked, mirror
    from res2net_zoo.utils.console import progress_bar, report
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.markdown import markdown_table
    from res2net_zoo.weights.signature import SignatureError

    trust = trust_of(args)
    checkpoints = catalog.choose(args.model)
    if not args.model:
        for checkpoint in [c for c in checkpoints if not c.url and not c.hub_id and not (args.to / c.name).is_dir()]:
            checkpoints.remove(checkpoint)
            print(f"{checkpoint.name} is skipped: {checkpoint.notes}")
    rows, failed = [], []
    with locked(args.to):
        for checkpoint in progress_bar(None, checkpoints, desc="mirror"):
            try:
                origin = mirror(checkpoint, args.to, trust)
            except InputError as error:
                if len(checkpoints) > 1:
                    report(error)
                failed.append((checkpoint.name, error))
                continue
            size = (args.to / checkpoint.name / WEIGHTS).stat().st_size
            rows.append((checkpoint.name, f"{size / 1e6:.1f}", checkpoint.license, origin))
    if rows:
        print(markdown_table(("checkpoint", "MB", "licence", "from"), rows))
    if failed:
        names = ", ".join(name for name, _ in failed)
        refused = all(isinstance(error, SignatureError) for _, error in failed)
        outcome = "are refused ({})" if refused else "are missing ({}); run it again to resume"
        several = InputError(f"{len(failed)} of {len(checkpoints)} {outcome.format(names)}")
        problem = several if len(checkpoints) > 1 else failed[0][1]
        if refused:
            report(problem)
            return 1
        raise problem
    print(f"set RES2NET_ZOO_MIRROR={args.to.resolve()} for pretrained=True to read from there")
    return 0
