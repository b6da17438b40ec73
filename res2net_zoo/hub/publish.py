"""Publish folders of models and Spaces on the Hub: one commit, idempotent, without overwriting different weights."""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from res2net_zoo import catalog
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import open_regular, sha256_of
from res2net_zoo.utils.hub_client import (
    LONGEST,
    TRIES,
    HubUnavailableError,
    hash_of,
    is_blob_of,
    is_temporary,
    readable_errors,
    status_of,
    with_retries,
)
from res2net_zoo.weights import signature
from res2net_zoo.weights.model_folder import EVAL_RESULTS
from res2net_zoo.weights.provenance import of_folder
from res2net_zoo.weights.verification import Check, identify, read_card

COLLECTION = "Res2Net Zoo"
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".pdparams", ".joblib", ".npy", ".npz")

# Licence identifiers of the Hub that permit redistribution. All others forbid it, or are custom licences.
REDISTRIBUTABLE = (
    r"apache-2.0|mit|isc|zlib|unlicense|bsd|bsd-2-clause|bsd-3-clause(-clear)?|cc0-1.0"
    r"|cc-by(-nc)?(-sa)?-[234].[05]|[al]?gpl(-[23].[01])?|mpl-2.0|epl-[12].0|afl-3.0|artistic-2.0|openrail(\+\+)?"
).replace(".", r"\.")
# Licences that permit derivatives under another licence.
PERMISSIVE = r"apache-2\.0|mit|isc|zlib|unlicense|bsd|bsd-2-clause|bsd-3-clause(-clear)?|cc0-1\.0|cc-by-[234]\.[05]"


class LicenseError(InputError):
    """Weights whose licence does not clearly permit redistribution."""


@dataclass(frozen=True)
class Upload:
    """A file of the folder, compared with the repository.

    Attributes:
        path: Its path in the folder.
        size: Its size in bytes.
        sha256: Its SHA-256.
        state: `new`, `changed` or `unchanged`; `unknown` if the Hub is not reachable.
    """

    path: str
    size: int
    sha256: str
    state: str


@dataclass(frozen=True)
class UploadPlan:
    """The changes that publishing a folder would make.

    Attributes:
        repo_id: The repository.
        revision: The branch.
        creates: Whether the repository does not exist yet.
        branches: Whether the branch does not exist yet.
        private: Whether the repository is, or will be, private.
        head: The parent commit; None for a new repository.
        uploads: The folder's files.
        repo_type: `model` or `space`.
    """

    repo_id: str
    revision: str
    creates: bool
    branches: bool
    private: bool
    head: str | None
    uploads: list[Upload]
    repo_type: str = "model"

    @property
    def sent(self) -> list[Upload]:
        """The files that are new or changed."""
        return [upload for upload in self.uploads if upload.state != "unchanged"]


def files_of(folder: Path) -> list[str]:
    """Return the paths of the files in a model folder, without caches and hidden files.

    Raises:
        InputError: A file cannot be published: a pickle, a device or a pipe, or a link to outside the folder.
    """
    # Links to folders are listed but not followed.
    entries = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    paths = sorted(path.relative_to(folder).as_posix() for path in entries)
    kept = []
    for path in filter_repo_objects(paths, ignore_patterns=[*DEFAULT_IGNORE_PATTERNS, "*.part", "*.pyc"]):
        parts = path.split("/")
        if any(part.startswith(".") and part not in (EVAL_RESULTS, ".gitattributes") for part in parts):
            continue  # .cache, .DS_Store, .env
        if path.endswith(PICKLES):
            raise InputError(f"{folder / path} is a pickle, which is unsafe to load; remove it")
        check_inside(folder, path)
        kept.append(path)
    return kept


def check_inside(folder: Path, path: str) -> None:
    """Check that a path in a folder is a regular file within that folder.

    Raises:
        InputError: It is a link to outside the folder, or not a file.
    """
    root, target = folder.resolve(), (folder / path).resolve()
    if not target.is_relative_to(root) and not is_blob_of(root, target):
        raise InputError(f"{folder / path} is a link to a file outside of the folder; replace it with the file")
    if target.is_dir():
        raise InputError(f"{folder / path} is a link to a folder; replace it with the folder")
    with open_regular(folder / path):
        pass


def check_folder(folder: Path, verify: Callable[[Path], list[Check]]) -> None:
    """Check that a folder verifies and has a model card.

    Args:
        folder: The folder.
        verify: Returns the checks of a folder of its kind, a classifier's or a task's.

    Raises:
        InputError: It is not a model folder, or a check fails.
    """
    files_of(folder)
    if failed := [check for check in verify(folder) if check.passed is False]:
        what, found, expected, _ = failed[0]
        if what == "card":
            raise InputError(f"{found}; nothing was uploaded")
        raise InputError(f"{folder} does not verify: {what}: {found}, not {expected}; nothing was uploaded")
    if not (folder / "README.md").is_file():
        raise InputError(f"{folder} has no model card (README.md); nothing was uploaded")


def check_signature(folder: Path, plan: UploadPlan) -> None:
    """Check that a folder's signature covers what is uploaded; `verify` checks the signer.

    Raises:
        InputError: The signature covers other files than those that are uploaded, or is not a signature.
    """
    uploads = {upload.path: upload.sha256 for upload in plan.uploads if upload.path != ".gitattributes"}
    if uploads.pop(signature.NAME, None) is None:
        return
    signed = signature.signed_files(folder)
    left_out = sorted(signed.keys() - uploads.keys())
    if left_out and (folder / left_out[0]).exists():
        raise InputError(f"{folder / left_out[0]} is signed, but is not uploaded; remove it, and sign the folder again")
    if wrong := left_out + sorted(name for name, digest in uploads.items() if signed.get(name) != digest):
        raise InputError(f"{wrong[0]} has changed since {folder} was signed; sign it again, or remove {signature.NAME}")


def license_of(folder: Path) -> str | None:
    """Return the licence on a folder's model card; None if it has none.

    Raises:
        InputError: The card cannot be read.
    """
    license = read_card(folder).data.get("license")
    return license if isinstance(license, str) else None


def check_license(folder: Path) -> None:
    """Check that the licence of a folder's weights clearly permits redistribution.

    Raises:
        LicenseError: The licence is missing or unknown, forbids redistribution, may not cover the weights, or
            contradicts the folder's provenance or the licence of the weights that these derive from.
    """
    advice = "publish it to a private repository, or despite its licence if you have permission"
    ways = ("private", "despite_license")
    checkpoint, license, origin = identify(folder), license_of(folder), of_folder(folder)
    if checkpoint and checkpoint.license_note:
        raise LicenseError(
            f"the licence of {checkpoint.name} may not cover its weights ({checkpoint.license}: "
            f"{checkpoint.license_note}); {advice}",
            *ways,
        )
    if not license:
        raise LicenseError(
            f"the card of {folder} states no licence; add `license:` to its metadata, or {advice}", *ways
        )
    if checkpoint and license != checkpoint.license.lower():
        raise LicenseError(
            f"the card of {folder} states {license}, the release {checkpoint.license}; correct it, or {advice}", *ways
        )
    if not re.fullmatch(REDISTRIBUTABLE, license):
        raise LicenseError(f"the licence {license} of {folder} forbids redistribution, or is unknown; {advice}", *ways)
    if origin.license and license != origin.license.lower():
        raise LicenseError(
            f"the card of {folder} states the licence {license}, its config.json {origin.license}; correct one, "
            f"or {advice}",
            *ways,
        )
    if (parent := catalog.load().checkpoints.get(origin.checkpoint or "")) and parent.license_note:
        raise LicenseError(
            f"{folder} derives from {parent.name}, whose licence may not cover its weights "
            f"({parent.license}: {parent.license_note}); {advice}",
            *ways,
        )
    inherited = (origin.inherited_license or license).lower()
    if license != inherited and not re.fullmatch(PERMISSIVE, inherited):
        raise LicenseError(
            f"the card of {folder} states the licence {license}, but the weights that it derives from have "
            f"{inherited}, which may not permit this; {advice}",
            *ways,
        )


def make_plan(
    folder: Path, repo_id: str, revision: str = "main", private: bool = False, repo_type: str = "model"
) -> UploadPlan:
    """Compare a folder with a repository on the Hub.

    Args:
        folder: The folder.
        repo_id: The repository, as ORG/NAME.
        revision: The branch.
        private: Whether a new repository is private.
        repo_type: `model` or `space`.

    Returns:
        The changes that publishing the folder would make.

    Raises:
        InputError: The request fails.
    """
    api, branches = HfApi(), False
    info: Any  # of a model or a Space, with the same attributes
    kind: Any = dict(repo_type=repo_type, files_metadata=True)
    with readable_errors(repo_id):
        try:
            info = with_retries(lambda: api.repo_info(repo_id, revision=revision, **kind))
        except RevisionNotFoundError:  # a new branch, which starts from main
            info, branches = with_retries(lambda: api.repo_info(repo_id, **kind)), True
        except RepositoryNotFoundError:
            info, branches = None, revision != "main"
    there = {file.rfilename: file for file in (info.siblings or [] if info else [])}
    uploads = []
    for name in files_of(folder):
        path, state = folder / name, "new"
        if file := there.get(name):
            known = file.lfs.sha256 if file.lfs else file.blob_id
            state = "unchanged" if hash_of(path, bool(file.lfs)) == known else "changed"
        uploads.append(Upload(name, path.stat().st_size, sha256_of(path), state))
    is_private = bool(info.private) if info else private
    head = info.sha if info else None
    return UploadPlan(repo_id, revision, info is None, branches, is_private, head, uploads, repo_type)


def make_plan_or_guess(
    folder: Path, repo_id: str, revision: str = "main", private: bool = False, repo_type: str = "model"
) -> tuple[UploadPlan, str]:
    """Like `make_plan`, but also works if the Hub is not reachable.

    Returns:
        The plan, and why the Hub is not reachable; "" if it is.

    Raises:
        InputError: As `make_plan`, unless the Hub is not reachable.
    """
    try:
        return make_plan(folder, repo_id, revision, private, repo_type), ""
    except HubUnavailableError as error:
        paths = [(name, folder / name) for name in files_of(folder)]
        uploads = [Upload(name, path.stat().st_size, sha256_of(path), "unknown") for name, path in paths]
        return UploadPlan(repo_id, revision, False, False, private, None, uploads, repo_type), str(error)


def check_weights(plan: UploadPlan, force: bool) -> None:
    """Check that no different weights would be overwritten, unless forced.

    Raises:
        InputError: Different weights would be overwritten.
    """
    if not (force or plan.branches) and any(
        upload.path == WEIGHTS and upload.state == "changed" for upload in plan.uploads
    ):
        raise InputError(
            f"{plan.repo_id} has a different {WEIGHTS} at {plan.revision}, which would be overwritten; "
            "publish to another repository, as a pull request, or by force",
            *("repo_id", "create_pr", "force"),
        )


def publish(folder: Path, plan: UploadPlan, create_pr: bool = False, force: bool = False) -> str:
    """Publish a folder in one commit.

    If the Hub's response to a commit is lost, the repository is compared again before the commit is
    repeated.

    Args:
        folder: The folder.
        plan: The result of `make_plan`.
        create_pr: Create a pull request.
        force: Overwrite different weights.

    Returns:
        A message with a URL.

    Raises:
        InputError: The upload fails.
    """
    repo_id, revision, private, api = plan.repo_id, plan.revision, plan.private, HfApi()
    kind: Any = dict(repo_type=plan.repo_type)
    sdk = "gradio" if plan.repo_type == "space" else None

    def compare_again() -> UploadPlan:
        new = make_plan(folder, repo_id, revision, private, plan.repo_type)
        if private and not new.private:
            raise InputError(f"{repo_id} has become public in the meantime; nothing was uploaded")
        return new

    start = time.monotonic()
    with readable_errors(repo_id):
        if plan.creates:
            with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True, space_sdk=sdk, **kind))
            plan = compare_again()  # a new repository has an initial commit, and others may have written to it
        if plan.branches and not create_pr:
            with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True, **kind))
            force = True  # the branch is a copy of main, whose weights remain on main
        for attempt in range(TRIES):
            if not create_pr:
                check_weights(plan, force)
            if not plan.sent:
                return f"published: {repo_id}" if attempt else f"{repo_id} is up to date"
            title = _title(folder, plan)
            if create_pr and (url := _pull_request(plan, title)):
                return f"already proposed: {url}"
            try:
                done = _commit(api, folder, plan, title, create_pr)
            except HTTPError as error:
                temporary = is_temporary(error) or status_of(error) == 412
                if attempt == TRIES - 1 or time.monotonic() - start > LONGEST or not temporary:
                    raise
                time.sleep(2**attempt)
                plan = compare_again()
                continue
            return f"proposed: {done.pr_url}" if create_pr else f"published: {done.commit_url}"
    raise AssertionError("unreachable")


def _title(folder: Path, plan: UploadPlan) -> str:
    """Return the commit's title, which identifies the uploaded content by the first digits of a hash."""
    content = "".join(f"{upload.path} {upload.sha256}\n" for upload in plan.sent)
    files = f"{len(plan.sent)} file{'s' if len(plan.sent) > 1 else ''}"
    return f"Upload {folder.resolve().name}, {files} ({hashlib.sha256(content.encode()).hexdigest()[:10]})"


def _commit(api: HfApi, folder: Path, plan: UploadPlan, title: str, create_pr: bool) -> CommitInfo:
    operations = [CommitOperationAdd(upload.path, folder / upload.path) for upload in plan.sent]
    try:
        return api.create_commit(
            plan.repo_id,
            operations,
            commit_message=title,
            revision=None if create_pr else plan.revision,
            create_pr=create_pr,
            parent_commit=plan.head,
            repo_type=plan.repo_type,
        )
    except ValueError as error:
        raise InputError(f"the Hub rejects the card of {folder}: {one_line(error)}") from error
    except RuntimeError as error:  # raised by the client if an upload to LFS fails after its own retries
        cause = error.__cause__
        if isinstance(cause, HTTPError):
            raise cause from error
        raise InputError(f"cannot upload {folder}: {one_line(error)}; run it again to continue") from error


def _pull_request(plan: UploadPlan, title: str) -> str | None:
    """Return the URL of an open pull request with a title, None if there is none."""
    kind: Any = dict(repo_type=plan.repo_type, discussion_type="pull_request")
    found = with_retries(lambda: list(HfApi().get_repo_discussions(plan.repo_id, **kind)))
    return next((d.url for d in found if d.title == title and d.status in ("open", "draft")), None)


def add_to_collection(
    repo_id: str, title: str = COLLECTION, private: bool = False, repo_type: Literal["model", "space"] = "model"
) -> str:
    """Add a repository to a collection of its owner, which is created if necessary.

    Args:
        repo_id: The repository.
        title: The collection's title.
        private: Whether a new collection is private. An existing one is not changed: a public
            collection shows private repositories only to users who have access to them.
        repo_type: `model` or `space`.

    Returns:
        The collection's slug.

    Raises:
        InputError: The Hub rejects the request.
    """
    owner, api = repo_id.partition("/")[0], HfApi()
    with readable_errors(repo_id):
        found = [c for c in with_retries(lambda: list(api.list_collections(owner=owner))) if c.title == title]
        collection = found[0] if found else None
        if collection is None:
            description = "Res2Net models (arXiv:1904.01169) with provenance, licence and published accuracies."
            collection = with_retries(
                lambda: api.create_collection(
                    title, namespace=owner, description=description, private=private, exists_ok=True
                )
            )
        slug = collection.slug
        with_retries(lambda: api.add_collection_item(slug, repo_id, repo_type, exists_ok=True))
    return slug
