"""Copy checkpoints into a folder for use with no network; run it again to go on after an interruption.

python hub/mirror.py --to mirror                                       (all that can be downloaded)
python hub/mirror.py --to mirror --model res2net50_26w_4s res2net101d.mindcv_in1k
RES2NET_ZOO_MIRROR=mirror python ...                                   (pretrained=True reads from there)
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from arguments import Parser


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="the mirror; made if it is not there")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="which checkpoints, as arch.tag or arch for its default; all that can be downloaded by default",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

    import res2net_zoo  # noqa: F401  registers the models
    from res2net_zoo import catalog
    from res2net_zoo.hub.mirror import locked, mirror
    from res2net_zoo.utils.console import progress_bar, report
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.markdown import markdown_table

    checkpoints = catalog.choose(args.model)
    if not args.model:
        for checkpoint in [c for c in checkpoints if not c.url and not c.hub_id and not (args.to / c.name).is_dir()]:
            checkpoints.remove(checkpoint)
            print(f"{checkpoint.name} is left out: {checkpoint.notes}")
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
        raise InputError(f"{len(failed)} of {len(checkpoints)} are missing ({names}); run it again to go on")
    print(f"RES2NET_ZOO_MIRROR={args.to.resolve()} makes pretrained=True read from there")
    return 0


if __name__ == "__main__":
    arguments = parse_args()
    from res2net_zoo.utils.console import run

    sys.exit(run(lambda: main(arguments)))
