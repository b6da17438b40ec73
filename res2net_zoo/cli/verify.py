"""Check a folder or repository: signature, hashes, bill of materials, catalogue, strict load, logits.

Usage: res2net-zoo verify DIR | ORG/NAME [--revision NAME] [--public-key KEY] [--output FILE]
       res2net-zoo verify FILE.onnx | FILE.xml

With --public-key, the folder must be signed by that key (`res2net-zoo sign`). The signature is checked first; if it
fails, nothing else is read.

For a file of `res2net-zoo export`, it reports format, precision, model, provenance, accuracies and hash. The precision
is derived from the network; metadata, name and card must agree with it. The network is not run.

Examples:
  res2net-zoo verify ssld
  res2net-zoo verify outputs/mine --public-key key.pub --output checks.json
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
from res2net_zoo.cli.keys import add_trust, check_trust, trust_of

if TYPE_CHECKING:
    from res2net_zoo.catalog import Checkpoint
    from res2net_zoo.weights.checks import Check
    from res2net_zoo.weights.signature import Trust


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "model", metavar="DIR | ORG/NAME | FILE", help="model folder, repository on the Hub, or exported file"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository (default: main)")
    add_trust(parser.add_argument, "the folder must be signed")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the checks as JSON")
    args = parser.parse_args(argv)
    check_trust(parser, args)
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo import catalog
    from res2net_zoo.utils import hub_client
    from res2net_zoo.utils.console import report, similar_path
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_writable_file
    from res2net_zoo.weights.checks import Check
    from res2net_zoo.weights.model_names import check_folder, is_path

    if args.output:
        check_writable_file(args.output)
    if Path(args.model).suffix in (".onnx", ".xml") and not os.path.isdir(args.model):
        return verify_file(args)
    trust, checks = trust_of(args), []
    source, colon, name = args.model.partition(":")
    if colon and source in ("local-dir", "hf-hub"):
        args.model = name
    folder = Path(args.model)
    if source == "local-dir" or (source != "hf-hub" and (os.path.exists(folder) or is_path(args.model))):
        check_folder(args.model)
        if args.output and args.output.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{args.output} is in the folder that is verified, which would change it", "output")
        if args.revision:
            raise InputError(f"{folder} is a folder, which has no revisions; remove --revision")
    elif "/" not in args.model:
        raise InputError(f"there is no model folder {args.model}{similar_path(folder) or '; a repository is ORG/NAME'}")
    else:
        folder = hub_client.snapshot(args.model, args.revision, everything=trust is not None)
        checks.append(Check("files", f"those of commit {folder.name}", "as on the Hub", True))
    signed = signature_of(folder, trust)
    if signed.passed is False:
        report(f"{args.model}: {signed.what}: {signed.found}; nothing else was read")
        return print_checks(args, [signed])
    # A repository in the catalogue must contain its checkpoint.
    known = [c for c in catalog.load().checkpoints.values() if c.hub_id == args.model]
    return print_checks(args, [signed, *checks, *checks_of(folder, known[0] if known else None)])


def signature_of(folder: Path, trust: "Trust | None") -> "Check":
    """Check the signature of a folder; without a key it is only reported whether there is one."""
    from res2net_zoo.weights import signature
    from res2net_zoo.weights.checks import Check

    if trust:
        return signature.check(folder, trust)
    is_signed = os.path.lexists(folder / signature.NAME)
    return Check("signature", f"{signature.NAME}, not checked" if is_signed else "not signed", "no key is given", None)


def verify_file(args: argparse.Namespace) -> int:
    """Check an exported file; return the exit code."""
    from res2net_zoo.inference.file_verification import verify
    from res2net_zoo.utils.console import similar_path
    from res2net_zoo.utils.errors import InputError

    path = Path(args.model)
    if args.revision:
        raise InputError(f"{path} is a file, which has no revisions; remove --revision")
    if trust_of(args):
        raise InputError(f"{path} is a file; a signature covers a folder: name that, or remove the option of the key")
    if not path.exists():
        raise InputError(f"there is no file {path}{similar_path(path)}")
    return print_checks(args, verify(path))


def print_checks(args: argparse.Namespace, checks: "list[Check]") -> int:
    """Print checks as a table, and write them as JSON to --output; return the exit code."""
    from res2net_zoo.cli.results import ResultsFile
    from res2net_zoo.utils.console import printable
    from res2net_zoo.utils.markdown import markdown_table

    words = {True: "passed", False: "FAILED", None: "-"}
    # Sixteen digits identify a hash; fingerprint.json and the catalogue contain all of them.
    short = [[re.sub(r"\b([0-9a-f]{16})[0-9a-f]{24,}", r"\1...", text) for text in check[:3]] for check in checks]
    short = [[printable(text) for text in texts] for texts in short]
    rows = [(*texts, words[check.passed]) for texts, check in zip(short, checks, strict=True)]
    print(markdown_table(("check", "found", "expected", "result"), rows))
    results, name = ResultsFile(args.output), args.model
    results.write(
        [
            {"check": check.what, "found": check.found, "expected": check.expected, "passed": check.passed}
            for check in checks
        ]
    )
    results.check("above")
    if failed := [check for check in checks if check.passed is False]:
        print(f"{printable(name)}: {len(failed)} of {len(checks)} checks failed")
        return 1
    sure = any(
        check.passed and check.what.startswith(("signature", "SHA-256", "bill of materials")) for check in checks
    )
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
