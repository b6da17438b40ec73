"""Convert an original's weight file to a model folder: safetensors, config and card, as timm and the Hub read it.

python hub/convert.py --model res2net50_vd_26w_4s.ssld_in1k --output DIR                 (from its URL)
python hub/convert.py --model res2net152d.in1k --checkpoint FILE --output DIR            (from a file)
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    quiet: dict[str, Any] = {"usage": argparse.SUPPRESS}  # so that a wrong argument is told in one line
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "", **quiet)
    parser.add_argument("--model", required=True, metavar="ARCH.TAG", help="which of the catalogue's checkpoints")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="the original's file, or its URL; the catalogue's by default"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model folder to write")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    import timm

    import res2net_zoo  # noqa: F401  registers the models
    from res2net_zoo import catalog, weights
    from res2net_zoo.folder import model_card, write_model_folder
    from res2net_zoo.program import InputError, check_writable, nearest

    checkpoints = catalog.load().checkpoints
    checkpoint = catalog.load().checkpoint(args.model)
    if checkpoint is None:
        raise InputError(f"the catalogue has no checkpoint {args.model}; {nearest(args.model, list(checkpoints))}")
    source = args.checkpoint or checkpoint.url
    if not source:
        raise InputError(f"{checkpoint.name} is no direct download: {checkpoint.notes}; give its file by --checkpoint")
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; name a folder")
    args.output.resolve().parent.mkdir(parents=True, exist_ok=True)
    check_writable(args.output.resolve().parent)
    with tempfile.TemporaryDirectory() as folder:
        path, url = Path(source), None
        if source.startswith(("https://", "http://")):
            path, url = Path(folder) / source.rpartition("/")[2], source
            weights.download(source, path)
        state, metadata = weights.read_original(path, checkpoint, url)
    model: Any = timm.create_model(checkpoint.architecture, num_classes=checkpoint.num_classes)
    model.load_state_dict(state, strict=True)
    cfg: Any = timm.get_pretrained_cfg(checkpoint.name)
    model.pretrained_cfg = {**cfg.to_dict(), "architecture": checkpoint.architecture, "tag": checkpoint.tag}
    # Of each dataset the first accuracy is the one to compare with.
    first = {accuracy.dataset: accuracy for accuracy in reversed(checkpoint.accuracies)}
    card = model_card(
        checkpoint.name, card_text(checkpoint, metadata), checkpoint.license.lower(), list(reversed(first.values()))
    )
    write_model_folder(args.output, model, card, metadata=metadata)
    checked = "the released one" if checkpoint.sha256 else "and none was ever published"
    print(f"{checkpoint.name} in {args.output}: SHA-256 of the original {metadata['source_sha256']}, {checked}")
    return 0


def card_text(checkpoint: Any, metadata: dict[str, str]) -> str:
    """Return the card's Markdown: usage, provenance and figures."""
    from res2net_zoo import catalog
    from res2net_zoo.program import markdown_table

    architecture = catalog.load().architectures[checkpoint.architecture]
    licence = checkpoint.license + (f" ({checkpoint.license_note})" if checkpoint.license_note else "")
    provenance = [
        ("released by", checkpoint.released_by),
        ("original", metadata["source"]),
        ("SHA-256 of the original", metadata["source_sha256"]),
        ("SHA-256 as released", checkpoint.sha256 or "none was ever published"),
        ("licence as released", licence),
        ("parameters", f"{architecture.parameters:,}"),
        ("GMACs", f"{architecture.macs / 1e9:.2f} at {architecture.input_size[1]}x{architecture.input_size[2]}"),
    ]
    figures = [(a.dataset, a.split, f"{a.top1:.3f}", f"{a.top5:.3f}", a.source) for a in checkpoint.accuracies]
    parts = [
        f"# {checkpoint.name}",
        f"{architecture.title}. {checkpoint.notes[:1].upper()}{checkpoint.notes[1:]}".rstrip(". ") + ".",
        "## Use",
        "```python\nimport timm\nimport res2net_zoo  # registers the model\n\n"
        'model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # DIR: this folder\n```',
        "## Provenance",
        markdown_table(("what", "value"), provenance),
        "## Published accuracies" if figures else "## Accuracy\n\nNone was ever published.",
        markdown_table(("dataset", "split", "top-1", "top-5", "source"), figures) if figures else "",
        "## Citation",
        "Gao et al., Res2Net: A New Multi-scale Backbone Architecture, TPAMI 2021, arXiv:1904.01169.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    arguments = parse_args()
    from res2net_zoo.program import run

    sys.exit(run(lambda: main(arguments)))
