"""Convert a published weight file to a model folder for timm and the Hub.

Usage: res2net-zoo convert --model NAME [--checkpoint FILE] --output DIR

The folder holds model.safetensors, config.json, a card and a fingerprint. NAME is arch.tag, a checkpoint of the
catalogue. The output is reproducible: the same file always results in the same bytes.

Examples:
  res2net-zoo convert --model res2net50_vd_26w_4s.ssld_in1k --output ssld
  res2net-zoo convert --model res2net152d.in1k --checkpoint res2net152.pth --output mirror/res2net152d.in1k

Exit codes: 0 done; 2 bad input.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from res2net_zoo.cli.command import command, parser_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="arch.tag of the catalogue's checkpoint")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="published weight file, or its URL (default: the catalogue's URL)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="model folder to write")
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

    from res2net_zoo import catalog
    from res2net_zoo.utils.console import similar_path
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_can_make, locked
    from res2net_zoo.weights import downloads
    from res2net_zoo.weights.model_folder import write_converted

    (checkpoint,) = catalog.choose([args.model])
    source = checkpoint.url if args.checkpoint is None else args.checkpoint
    if not source:
        raise InputError(
            f"{checkpoint.name} has no direct download: {checkpoint.notes}; name its file with --checkpoint"
        )
    if args.checkpoint is not None and "://" not in source and not os.path.exists(source):
        raise InputError(f"cannot read {source}: No such file{similar_path(Path(source))}")
    check_can_make(args.output)
    is_model = all((args.output / name).is_file() for name in ("config.json", WEIGHTS))
    if args.output.is_dir() and any(args.output.iterdir()) and not is_model:
        raise InputError(f"--output {args.output} is not empty and not a model folder; name a new folder")
    with locked(args.output):
        if source.startswith(("https://", "http://")):
            with downloads.original(source) as path:
                state, metadata = downloads.read_original(path, checkpoint, source)
                write_converted(args.output, checkpoint, state, metadata)
        else:
            state, metadata = downloads.read_original(Path(source), checkpoint)
            write_converted(args.output, checkpoint, state, metadata)
    name, checked = checkpoint.name, "as published" if checkpoint.sha256 else "not verified: no hash was published"
    if not downloads.is_released(checkpoint, metadata):
        name, checked = checkpoint.architecture, f"different from {checkpoint.name}"
    print(f"{name} in {args.output}: SHA-256 of the original {metadata['source_sha256']}, {checked}")
    return 0
