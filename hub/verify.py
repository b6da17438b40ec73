"""Check that a model is what it says it is: hashes, strict load, preprocessing, logits of a fixed input.

python hub/verify.py DIR
python hub/verify.py ORG/NAME --revision v1
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from arguments import Parser


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("model", metavar="ORG/NAME | DIR", help="a repository on the Hub, or a model folder")
    parser.add_argument("--revision", help="branch, tag or commit of the repository; main by default")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    import res2net_zoo  # noqa: F401  registers the models
    from res2net_zoo import catalog, hub, verify
    from res2net_zoo.program import InputError, markdown_table

    folder, checks = Path(args.model), []
    if args.model and folder.is_dir():
        if args.revision:
            raise InputError(f"{folder} is a folder, and has no --revision")
    elif args.model.count("/") != 1 or args.model.startswith((".", "/", "~")):
        raise InputError(f"there is no folder {args.model}, and it is no repository id ORG/NAME")
    else:
        folder = hub.snapshot(args.model, args.revision)
        checks.append(verify.Check("files", f"those of commit {folder.name}", "as the Hub has them", True))
    # A repository that the catalogue names must have what it is named for.
    known = [c for c in catalog.load().checkpoints.values() if c.hub_id == args.model]
    checks += verify.verify(folder, known[0] if known else None)
    results = {True: "passed", False: "FAILED", None: "-"}
    # Sixteen digits of a hash say enough; fingerprint.json and the catalogue have them all.
    short = [[re.sub(r"\b([0-9a-f]{16})[0-9a-f]{24,}", r"\1...", text) for text in check[:3]] for check in checks]
    rows = [(*texts, results[check.passed]) for texts, check in zip(short, checks, strict=True)]
    print(markdown_table(("check", "found", "expected", "result"), rows))
    if failed := [check for check in checks if check.passed is False]:
        print(f"{args.model}: {len(failed)} of {len(checks)} checks failed")
        return 1
    sure = any(check.passed and check.what.startswith("SHA-256") for check in checks)
    print(f"{args.model}: passed" + ("" if sure else "; but nobody has said what the hash of its weights should be"))
    return 0


if __name__ == "__main__":
    arguments = parse_args()
    from res2net_zoo.program import run

    sys.exit(run(lambda: main(arguments)))
