"""Convert an original's weight file to a model folder: safetensors, config and card, as timm and the Hub read it.

python hub/convert.py --model res2net50_vd_26w_4s.ssld_in1k --output DIR                 (from its URL)
python hub/convert.py --model res2net152d.in1k --checkpoint FILE --output DIR            (from a file)
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from arguments import Parser


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--model", required=True, metavar="ARCH.TAG", help="which of the catalogue's checkpoints")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="the original's file, or its URL; the catalogue's by default"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model folder to write")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

    import res2net_zoo  # noqa: F401  registers the models
    from res2net_zoo import catalog
    from res2net_zoo.utils.console import similar_path
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_can_make, locked
    from res2net_zoo.weights import originals
    from res2net_zoo.weights.model_folder import write_converted

    (checkpoint,) = catalog.choose([args.model])
    source = checkpoint.url if args.checkpoint is None else args.checkpoint
    if not source:
        raise InputError(f"{checkpoint.name} is no direct download: {checkpoint.notes}; give its file by --checkpoint")
    if args.checkpoint is not None and "://" not in source and not os.path.exists(source):
        raise InputError(f"cannot read {source}: No such file{similar_path(Path(source))}")
    check_can_make(args.output)
    is_model = all((args.output / name).is_file() for name in ("config.json", WEIGHTS))
    if args.output.is_dir() and any(args.output.iterdir()) and not is_model:
        raise InputError(f"--output {args.output} holds something else than a model; name a new folder")
    with locked(args.output):
        if source.startswith(("https://", "http://")):
            with originals.original(source) as path:
                state, metadata = originals.read_original(path, checkpoint, source)
                write_converted(args.output, checkpoint, state, metadata)
        else:
            state, metadata = originals.read_original(Path(source), checkpoint)
            write_converted(args.output, checkpoint, state, metadata)
    name, checked = checkpoint.name, "the released one" if checkpoint.sha256 else "and none was ever published"
    if not originals.is_released(checkpoint, metadata):
        name, checked = checkpoint.architecture, f"not that of {checkpoint.name}"
    print(f"{name} in {args.output}: SHA-256 of the original {metadata['source_sha256']}, {checked}")
    return 0


if __name__ == "__main__":
    arguments = parse_args()
    from res2net_zoo.utils.console import run

    sys.exit(run(lambda: main(arguments)))
