"""Convert a weight file to a model folder for timm and the Hub.

Usage: res2net-zoo convert [--model NAME] [--checkpoint FILE] --output DIR

FILE is a published weight file, or any checkpoint that contains a Res2Net: of a training run, detector or segmenter.
The one complete Res2Net is found by the names and shapes of its tensors, under any prefix, and its model is recognized.
The wiring (official, paddle, mmdet) determines what the weights compute; name it if the file does not show it.

If NAME is arch.tag, a checkpoint of the catalogue, the whole file must match it; without FILE it is downloaded.

The folder contains model.safetensors, config.json, a card, a fingerprint and a bill of materials. The output is
reproducible: the same file always results in the same bytes.

Examples:
  res2net-zoo convert --model res2net50_vd_26w_4s.ssld_in1k --output ssld
  res2net-zoo convert --model res2net152d.in1k --checkpoint res2net152.pth --output mirror/res2net152d.in1k
  res2net-zoo convert --checkpoint faster_rcnn_r2_101_fpn_2x_coco.pth --output detector-backbone
  res2net-zoo convert --checkpoint last.ckpt --wiring official --output segmenter-backbone
  res2net-zoo convert --checkpoint both.pth --prefix teacher.backbone --model res2net50d --output teacher

Exit codes: 0 done; 2 bad input.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from res2net_zoo.cli.command import command, parser_of

if TYPE_CHECKING:
    from res2net_zoo.catalog import Checkpoint
    from res2net_zoo.weights.backbone import Backbone

SHOWN = 12  # prefixes of tensors that are left out


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--model", help="arch.tag of the catalogue's checkpoint, or the architecture (default: recognized)"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weight file, or its URL (default: the catalogue's URL)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="model folder to write")
    parser.add_argument(
        "--prefix", metavar="P", help="prefix of the backbone's tensors, such as backbone (default: the only one)"
    )
    parser.add_argument(
        "--wiring",
        choices=("official", "paddle", "mmdet"),
        help="code that the weights were trained with: the authors', timm's or MMPretrain's; PaddleClas's; "
        "MMDetection's (default: what the file implies)",
    )
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo import catalog
    from res2net_zoo.utils.console import similar_path
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import locked
    from res2net_zoo.weights import downloads

    if args.model is None and args.checkpoint is None:
        raise InputError("name a weight file, or a checkpoint of the catalogue", "checkpoint", "model")
    chooses = args.prefix is not None or args.wiring is not None
    if args.checkpoint is None and chooses:
        raise InputError("a prefix and a wiring choose what to take from a file; name the file", "checkpoint")
    is_search = args.checkpoint is not None and (chooses or "." not in (args.model or ""))
    checkpoint = None if is_search else catalog.choose([args.model])[0]
    source = args.checkpoint
    if checkpoint and source is None and not (source := checkpoint.url):
        raise InputError(
            f"{checkpoint.name} has no direct download: {checkpoint.notes}; name its file with --checkpoint"
        )
    if args.checkpoint is not None and "://" not in source and not os.path.exists(source):
        raise InputError(f"cannot read {source}: No such file{similar_path(Path(source))}")
    check_output(args.output)
    with locked(args.output):
        if source.startswith(("https://", "http://")):
            with downloads.original(source) as path:
                write(args, path, checkpoint, source)
        else:
            write(args, Path(source), checkpoint)
    return 0


def check_output(folder: Path) -> None:
    """Check that a folder can be written and is new, empty or a model folder.

    Raises:
        InputError: It is not.
    """
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_can_make

    check_can_make(folder)
    is_model = all((folder / name).is_file() for name in ("config.json", WEIGHTS))
    if folder.is_dir() and any(folder.iterdir()) and not is_model:
        raise InputError(f"--output {folder} is not empty and not a model folder; name a new folder")


def write(args: argparse.Namespace, path: Path, checkpoint: "Checkpoint | None", source: str | None = None) -> None:
    """Convert a file, as a checkpoint of the catalogue or as one in which a backbone must be found.

    Args:
        args: The arguments.
        path: The file.
        checkpoint: The checkpoint that it must match; None if it is not known.
        source: The URL of a download; None for a local file.
    """
    from res2net_zoo.weights import downloads
    from res2net_zoo.weights.backbone import check_architecture
    from res2net_zoo.weights.model_folder import write_converted, write_found

    architecture = check_architecture(args.model) if checkpoint is None and args.model else None
    if checkpoint is None and args.prefix is None:
        checkpoint = downloads.released_as(path, architecture, args.wiring)
    if checkpoint is None:
        backbone, metadata = downloads.read_backbone(path, args.prefix, args.wiring, architecture, source)
        report(backbone)
        write_found(args.output, backbone, metadata)
        print(f"{backbone.architecture} in {args.output}: SHA-256 of the original {metadata['source_sha256']}")
        return
    state, metadata = downloads.read_original(path, checkpoint, source)
    write_converted(args.output, checkpoint, state, metadata)
    name, checked = checkpoint.name, "as published" if checkpoint.sha256 else "not verified: no hash was published"
    if not downloads.is_released(checkpoint, metadata):
        name, checked = checkpoint.architecture, f"different from {checkpoint.name}"
    print(f"{name} in {args.output}: SHA-256 of the original {metadata['source_sha256']}, {checked}")


def report(backbone: "Backbone") -> None:
    """Print what was recognized, and which tensors of the file are left out."""
    from res2net_zoo.utils.console import printable, warn
    from res2net_zoo.weights.backbone import group_by_prefix, under

    print(f"recognized {backbone.architecture} {under(backbone.prefix)}: {len(backbone.state)} tensors")
    print(f"  wiring {backbone.wiring}: {backbone.reason}")
    if channels := backbone.model_args.get("in_chans"):
        print(f"  channels of its images: {channels}")
    print(f"  classes: {backbone.num_classes or 'none, without a classifier'}")
    if backbone.contradiction:
        warn(backbone.contradiction)
    groups = group_by_prefix(backbone.left_out, backbone.prefix)
    print(f"left out {len(backbone.left_out)} tensors{':' if groups else ''}")
    for prefix, names in list(groups.items())[:SHOWN]:
        print(f"  {printable(prefix)[:80]} {len(names)}: {shown(names)}")
    if len(groups) > SHOWN:
        print(f"  and {len(groups) - SHOWN} other prefixes")


def shown(names: Sequence[str], number: int = 3) -> str:
    """Return the first of several names from a file, on one line."""
    from res2net_zoo.utils.console import printable

    return ", ".join([printable(name)[:80] for name in names[:number]] + ["..."] * (len(names) > number))
