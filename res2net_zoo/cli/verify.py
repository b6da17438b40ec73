"""Check a model folder or repository: hashes, strict load, preprocessing, logits of a fixed input.

Usage: res2net-zoo verify DIR | ORG/NAME [--revision NAME]
       res2net-zoo verify FILE.onnx | FILE.xml

Of a file of `res2net-zoo export` it reports format, precision, model, provenance, accuracies and hash. The precision is
derived from the network; metadata, name and card must agree with it. The network is not run.

Examples:
  res2net-zoo verify ssld
  res2net-zoo verify mine-int8.onnx
  res2net-zoo verify ORG/NAME --revision v1

Exit codes: 0 all checks passed; 1 a check failed; 2 bad input.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from res2net_zoo.cli.command import command, parser_of

if TYPE_CHECKING:
    from res2net_zoo.catalog import Checkpoint
    from res2net_zoo.weights.verification import Check


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "model", metavar="DIR | ORG/NAME | FILE", help="model folder, repository on the Hub, or exported file"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository (default: main)")
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo import catalog
    from res2net_zoo.utils import hub_client
    from res2net_zoo.utils.console import similar_path
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.weights.model_names import check_folder, is_path
    from res2net_zoo.weights.verification import Check

    if Path(args.model).suffix in (".onnx", ".xml") and not os.path.isdir(args.model):
        return verify_file(args)
    checks = []
    source, colon, name = args.model.partition(":")
    if colon and source in ("local-dir", "hf-hub"):
        args.model = name
    folder = Path(args.model)
    if source == "local-dir" or (source != "hf-hub" and (os.path.exists(folder) or is_path(args.model))):
        check_folder(args.model)
        if args.revision:
            raise InputError(f"{folder} is a folder, which has no revisions; remove --revision")
    elif "/" not in args.model:
        raise InputError(f"there is no model folder {args.model}{similar_path(folder) or '; a repository is ORG/NAME'}")
    else:
        folder = hub_client.snapshot(args.model, args.revision)
        checks.append(Check("files", f"those of commit {folder.name}", "as on the Hub", True))
    # A repository in the catalogue must contain its checkpoint.
    known = [c for c in catalog.load().checkpoints.values() if c.hub_id == args.model]
    checks += checks_of(folder, known[0] if known else None)
    return print_checks(args.model, checks)


def verify_file(args: argparse.Namespace) -> int:
    """Check an exported file; return the exit code."""
    from res2net_zoo.inference.file_verification import verify
    from res2net_zoo.utils.console import similar_path
    from res2net_zoo.utils.errors import InputError

    path = Path(args.model)
    if args.revision:
        raise InputError(f"{path} is a file, which has no revisions; remove --revision")
    if not path.exists():
        raise InputError(f"there is no file {path}{similar_path(path)}")
    return print_checks(args.model, verify(path))


def print_checks(name: str, checks: "list[Check]") -> int:
    """Print checks as a table; return the exit code."""
    from res2net_zoo.utils.console import printable
    from res2net_zoo.utils.markdown import markdown_table

    results = {True: "passed", False: "FAILED", None: "-"}
    # Sixteen digits identify a hash; fingerprint.json and the catalogue hold all of them.
    short = [[re.sub(r"\b([0-9a-f]{16})[0-9a-f]{24,}", r"\1...", text) for text in check[:3]] for check in checks]
    short = [[printable(text) for text in texts] for texts in short]
    rows = [(*texts, results[check.passed]) for texts, check in zip(short, checks, strict=True)]
    print(markdown_table(("check", "found", "expected", "result"), rows))
    if failed := [check for check in checks if check.passed is False]:
        print(f"{printable(name)}: {len(failed)} of {len(checks)} checks failed")
        return 1
    sure = any(check.passed and check.what.startswith("SHA-256") for check in checks)
    print(f"{printable(name)}: passed" + ("" if sure else "; the expected hash of its weights is unknown"))
    return 0


def checks_of(folder: Path, wanted: "Checkpoint | None" = None) -> "list[Check]":
    """Check the folder of a classifier or of a model for a task.

    Args:
        folder: The folder.
        wanted: The checkpoint that a classifier must be; None to identify it by its own metadata.
    """
    from res2net_zoo.inference.file_verification import checks_in, exported_files
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.weights import verification

    exported = exported_files(folder) if folder.is_dir() else []
    if exported and not (folder / "config.json").exists():
        raise InputError(f"{folder} is not a model folder; name one of its exported files, such as {exported[0]}")
    if verification.is_of_task(folder):
        from res2net_zoo.tasks.verification import verify  # imports the libraries of the tasks

        return verify(folder) + checks_in(folder)
    return verification.verify(folder, wanted) + checks_in(folder)
