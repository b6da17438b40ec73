"""Publish model folders, or the page of `space`, on the Hub, each in one commit.

Usage: res2net-zoo publish DIR --repo-id ORG/NAME [--sign-with KEY] [--private] [--create-pr] [--dry-run]
       res2net-zoo publish --space ORG/NAME [--private] [--create-pr] [--dry-run]
       res2net-zoo publish --all --org ORG

Files that are already in the repository are skipped. After an interruption, run it again to resume. With --all, the
catalogue's checkpoints are published, and their repositories are recorded in the catalogue.

Examples:
  res2net-zoo publish outputs/mine --repo-id ORG/mine --dry-run
  res2net-zoo publish outputs/mine --repo-id ORG/mine --sign-with key.pem
  res2net-zoo publish --space ORG/res2net-zoo --private
  res2net-zoo publish --all --org ORG --mirror mirror

Exit codes: 0 done; 2 bad input, or a checkpoint could not be published.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.keys import KEY_HELP, add_certificate, check_certificate, sign_folder, signer_of
from res2net_zoo.cli.shipped import shipped

if TYPE_CHECKING:
    from res2net_zoo.hub import publish


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="model folder to publish")
    add("--repo-id", metavar="ORG/NAME", help="repository to publish to")
    add("--space", metavar="ORG/NAME", help="Space to publish the page of `res2net-zoo space` to")
    add(
        "--all",
        action="store_true",
        help="publish all checkpoints of the catalogue, except those on the Hub under another owner",
    )
    add("--org", metavar="ORG", help="with --all: the owner, a user or an organization")
    add("--model", nargs="+", help="with --all: only these checkpoints, including those under another owner")
    add(
        "--mirror",
        type=Path,
        metavar="DIR",
        help="with --all: folder that `res2net-zoo mirror` writes (default: the cache)",
    )
    add("--private", action="store_true", help="create private repositories")
    add("--revision", default="main", help="branch, created if it does not exist (default: %(default)s)")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--dry-run", action="store_true", help="print what would be uploaded, and upload nothing")
    add("--force", action="store_true", help="overwrite different weights in the repository")
    add(
        "--despite-license",
        action="store_true",
        help="publish weights whose licence does not clearly permit redistribution",
    )
    add(
        "--collection",
        default="Res2Net Zoo",
        help="the owner's collection to add it to; '' for none (default: %(default)s)",
    )
    add("--sign-with", type=Path, metavar="KEY", help=KEY_HELP)
    add_certificate(add, "--sign-with")
    args = parser.parse_args(argv)
    check_certificate(parser, args, args.sign_with)
    if args.space and args.sign_with:
        parser.error("--sign-with signs model folders; remove it")
    if args.space and (args.all or args.folder or args.repo_id):
        parser.error("--space takes no DIR, --repo-id or --all")
    if args.all and (args.folder or args.repo_id or not args.org):
        parser.error("--all takes --org ORG, and no DIR or --repo-id")
    if not args.all and not args.space and not (args.folder and args.repo_id):
        parser.error("name a model folder and --repo-id ORG/NAME, or --space ORG/NAME, or --all --org ORG")
    if not args.all and (args.org or args.model or args.mirror):
        parser.error("--org, --model and --mirror need --all")
    if args.create_pr and args.revision != "main":
        parser.error("--create-pr opens a pull request on main; remove --revision")
    if len(args.collection) > 60:
        parser.error(f"--collection has {len(args.collection)} characters; the Hub allows 60")
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.weights.model_names import check_folder

    if args.all:
        publish_all(args)
    elif args.space:
        publish_one(args, shipped("space"), args.space)
    else:
        publish_one(args, check_folder(str(args.folder).removeprefix("local-dir:")), args.repo_id)
    return 0


def publish_one(args: argparse.Namespace, folder: Path, repo_id: str) -> "publish.UploadPlan":
    """Publish a folder, or print what would be uploaded."""
    from res2net_zoo.cli.verify import checks_of
    from res2net_zoo.hub import publish

    if not args.space:
        publish.check_folder(folder, checks_of)
    if args.dry_run:
        return show_plan(args, folder, repo_id)
    if not args.space:
        prepare(args, folder)
    plan = publish.make_plan(folder, repo_id, args.revision, args.private, repo_type(args))
    check_plan(args, plan)
    if needs_license(args, plan):
        publish.check_license(folder)
    if not args.create_pr:
        publish.check_weights(plan, args.force)
    publish.check_signature(folder, plan)
    print(table(plan))
    print(publish.publish(folder, plan, args.create_pr, args.force))
    if args.collection and not args.create_pr:
        slug = publish.add_to_collection(repo_id, args.collection, plan.private, repo_type(args))
        print(f"in the collection {slug}")
    return plan


def repo_type(args: argparse.Namespace) -> Literal["model", "space"]:
    """Return the type of the repository to publish to."""
    return "space" if args.space else "model"


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Sign a folder, or else renew the bill of materials of an unsigned one whose card has changed."""
    from res2net_zoo.utils.files import locked
    from res2net_zoo.weights import bill_of_materials

    if args.sign_with:
        with locked(folder):
            print(sign_folder(args, folder, args.sign_with))
    elif has_stale_bill(args, folder):
        bill_of_materials.write(folder)


def has_stale_bill(args: argparse.Namespace, folder: Path) -> bool:
    """Return whether the bill of materials is written again before the folder is published."""
    import os

    from res2net_zoo.weights import bill_of_materials, signature

    if args.sign_with:
        return bill_of_materials.is_stale(folder)
    signed = os.path.lexists(folder / signature.NAME)
    return not signed and os.access(folder, os.W_OK) and bill_of_materials.is_stale(folder, since=["README.md"])


def needs_license(args: argparse.Namespace, plan: "publish.UploadPlan") -> bool:
    """Return whether the licence of the weights must permit their publication; a Space lacks weights."""
    return not (plan.private or args.despite_license or args.space)


def check_plan(args: argparse.Namespace, plan: "publish.UploadPlan") -> None:
    """Check that the options can be applied to the repository."""
    from res2net_zoo.utils.errors import InputError

    if plan.creates and args.create_pr:
        kind = "Space" if args.space else "model"
        raise InputError(f"there is no {kind} {plan.repo_id} on the Hub to open a pull request on")
    if args.private and not plan.private:
        raise InputError(f"{plan.repo_id} is already public; --private cannot change this")


def table(plan: "publish.UploadPlan") -> str:
    """Return the files of a plan as a table."""
    from res2net_zoo.utils.console import printable
    from res2net_zoo.utils.markdown import markdown_table

    rows = [(printable(u.path), f"{u.size:,}", u.sha256[:16], u.state) for u in plan.uploads]
    return markdown_table(("file", "bytes", "SHA-256", "state"), rows)


def show_plan(args: argparse.Namespace, folder: Path, repo_id: str) -> "publish.UploadPlan":
    """Print what would be uploaded or refused; only reads from the Hub."""
    from res2net_zoo.hub import publish
    from res2net_zoo.utils.console import warn, with_options

    plan, unreachable = publish.make_plan_or_guess(folder, repo_id, args.revision, args.private, repo_type(args))
    print(table(plan))
    if not args.space and has_stale_bill(args, folder):
        print("would write the folder's bill of materials, bom.cdx.json, before")
    if args.sign_with:
        signer_of(args, args.sign_with)
        print(f"would sign the folder with {args.sign_with} before")
    else:
        publish.check_signature(folder, plan)
    if needs_license(args, plan):
        try:
            publish.check_license(folder)
        except publish.LicenseError as error:
            print(f"would be refused: {with_options(error)}")
    if unreachable:
        warn(f"not compared with {repo_id}: {unreachable}")
        print(f"would send those of {len(plan.uploads)} files that are missing in {repo_id}")
        return plan
    check_plan(args, plan)
    if not args.create_pr:
        publish.check_weights(plan, args.force)
    kind = "private" if plan.private else "public"
    what = f"{len(plan.sent)} of {len(plan.uploads)} files to the {'new ' if plan.creates else ''}{kind} {repo_id}"
    branch = f"{'the new branch ' if plan.branches else ''}{args.revision}"
    way = "a pull request" if args.create_pr else f"one commit to {branch}"
    print(f"would send {what} in {way}" if plan.sent else f"{repo_id} is up to date", end="")
    print(f", and add it to the collection {args.collection!r}" if args.collection and not args.create_pr else "")
    return plan


def publish_all(args: argparse.Namespace) -> None:
    """Publish the catalogue's checkpoints, and record their repositories in the catalogue."""
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS

    from res2net_zoo import catalog
    from res2net_zoo.hub.mirror import locked, mirror
    from res2net_zoo.hub.publish import LicenseError
    from res2net_zoo.utils.console import report, with_options
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_writable, sha256_of
    from res2net_zoo.utils.hub_client import assets

    root = args.mirror or assets("mirror", "all")
    records = not (args.dry_run or args.create_pr or args.revision != "main")
    if records:
        check_writable(catalog.path().parent)
    failed, recorded = [], 0
    with locked(root):
        for checkpoint in catalog.choose(args.model):
            name, folder, repo_id = checkpoint.name, root / checkpoint.name, f"{args.org}/{checkpoint.name}"
            if not args.model and checkpoint.hub_id.partition("/")[0] not in ("", args.org):
                print(f"{name}: skipped, already published as {checkpoint.hub_id} (--model {name} publishes it anyway)")
                continue
            if not args.model and not (checkpoint.url or checkpoint.hub_id or folder.is_dir()):
                print(f"{name}: skipped, no direct download ({checkpoint.notes})")
                continue
            print(f"{name}: to {repo_id}", flush=True)
            try:
                mirror(checkpoint, root)
                plan = publish_one(args, folder, repo_id)
                if records and plan.private:
                    print(f"{name}: not recorded in the catalogue, because {repo_id} is private")
                elif records:
                    catalog.record(name, hub_id=repo_id, hub_sha256=sha256_of(folder / WEIGHTS))
                    recorded += 1
            except LicenseError as error:
                print(f"{name}: skipped; {with_options(error)}")
            except InputError as error:
                report(f"{name}: {with_options(error)}")
                failed.append(name)
    if recorded:
        print(f"recorded in {catalog.path()}; `res2net-zoo list --update docs/models.md` updates the docs")
    if failed:
        raise InputError(f"{len(failed)} could not be published ({', '.join(failed)}); see the errors above")
