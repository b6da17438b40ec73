"""Putting a model folder on the Hub: in one commit, again without harm, never over a different weight."""

import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from res2net_zoo import catalog
from res2net_zoo.hub import verify
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import open_regular, sha256_of
from res2net_zoo.utils.hub_client import (
    LONGEST,
    TRIES,
    OutOfReachError,
    hash_of,
    is_temporary,
    patiently,
    plainly,
    status_of,
)
from res2net_zoo.weights.model_folder import EVAL_RESULTS
from res2net_zoo.weights.provenance import of_folder

COLLECTION = "Res2Net Zoo"
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".pdparams", ".joblib", ".npy", ".npz")

# Licences of the Hub's list that let anybody pass on what they cover. Others forbid it, or are
# texts of their own that somebody has to read first.
REDISTRIBUTABLE = (
    r"apache-2.0|mit|isc|zlib|unlicense|bsd|bsd-2-clause|bsd-3-clause(-clear)?|cc0-1.0"
    r"|cc-by(-nc)?(-sa)?-[234].[05]|[al]?gpl(-[23].[01])?|mpl-2.0|epl-[12].0|afl-3.0|artistic-2.0|openrail(\+\+)?"
).replace(".", r"\.")
# Those of them under which a derivative may have another licence.
PERMISSIVE = r"apache-2\.0|mit|isc|zlib|unlicense|bsd|bsd-2-clause|bsd-3-clause(-clear)?|cc0-1\.0|cc-by-[234]\.[05]"


class LicenseError(InputError):
    """A weight that may not plainly be passed on."""


@dataclass(frozen=True)
class Upload:
    """A file of the folder and what the Hub has in its place.

    Attributes:
        path: Its path in the folder.
        size: Its bytes.
        sha256: Its SHA-256.
        state: `new`, `changed` or `unchanged`; `unknown` where the Hub could not be asked.
    """

    path: str
    size: int
    sha256: str
    state: str


@dataclass(frozen=True)
class Plan:
    """What publishing a folder would do.

    Attributes:
        repo_id: The repository.
        revision: Branch of it.
        creates: Whether the repository has to be made.
        branches: Whether the branch has to be made.
        private: Whether it is private, or will be.
        head: Commit on which to put ours; None where there is none yet.
        uploads: The folder's files.
    """

    repo_id: str
    revision: str
    creates: bool
    branches: bool
    private: bool
    head: str | None
    uploads: list[Upload]

    @property
    def sent(self) -> list[Upload]:
        """What differs from the Hub's."""
        return [upload for upload in self.uploads if upload.state != "unchanged"]


def files_of(folder: Path) -> list[str]:
    """Return the paths of a model folder's files, without those that tools leave there.

    Raises:
        InputError: One cannot be published: a pickle, a device or a pipe, or a link that leads elsewhere.
    """
    # A link to a folder is listed as it is, and is not followed.
    entries = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    paths = sorted(path.relative_to(folder).as_posix() for path in entries)
    kept = []
    for path in filter_repo_objects(paths, ignore_patterns=[*DEFAULT_IGNORE_PATTERNS, "*.part"]):
        parts = path.split("/")
        if any(part.startswith(".") and part not in (EVAL_RESULTS, ".gitattributes") for part in parts):
            continue  # .cache, .DS_Store, .env
        if path.endswith(PICKLES):
            raise InputError(f"{folder / path} is a pickle, which nobody should load; take it out")
        check_inside(folder, path)
        kept.append(path)
    return kept


def check_inside(folder: Path, path: str) -> None:
    """Check that a path of a folder is a regular file of that folder.

    Raises:
        InputError: It is a link that leads elsewhere, or something else than a file.
    """
    root, target = folder.resolve(), (folder / path).resolve()
    # The Hub's own cache has links to its blobs: models--ORG--NAME/snapshots/COMMIT/FILE to models--ORG--NAME/blobs.
    in_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not target.is_relative_to(root) and not in_cache:
        raise InputError(f"{folder / path} leads to a file outside of the folder; put the file itself there")
    if target.is_dir():
        raise InputError(f"{folder / path} is a link to a folder; put the folder itself there")
    with open_regular(folder / path):
        pass


def check_folder(folder: Path) -> None:
    """Refuse a folder that does not verify, its card included.

    Raises:
        InputError: It is no model folder, or something of it is wrong.
    """
    files_of(folder)
    if failed := [check for check in verify.verify(folder) if check.passed is False]:
        what, found, expected, _ = failed[0]
        if what == "card":
            raise InputError(f"{found}; nothing was sent")
        raise InputError(f"{folder} does not verify: {what}: {found}, not {expected}; nothing was sent")
    if not (folder / "README.md").is_file():
        raise InputError(f"{folder} has no README.md, the model card; nothing was sent")


def license_of(folder: Path) -> str | None:
    """Return the licence that a model folder's card states, if it does.

    Raises:
        InputError: The card cannot be read.
    """
    license = verify.read_card(folder).data.get("license")
    return license if isinstance(license, str) else None


def check_license(folder: Path) -> None:
    """Refuse a weight that may not plainly be passed on.

    Raises:
        LicenseError: Its licence is unknown, forbids it, covers the weights only perhaps, or is another than
            that of its record or of the weights that it derives from.
    """
    advice = "publish it --private, or say --despite-license if you may"
    checkpoint, license, origin = verify.identify(folder), license_of(folder), of_folder(folder)
    if checkpoint and checkpoint.license_note:
        raise LicenseError(
            f"the licence of {checkpoint.name} is not plainly that of its weights ({checkpoint.license}: "
            f"{checkpoint.license_note}); {advice}"
        )
    if not license:
        raise LicenseError(f"the card of {folder} states no licence; add `license:` to its metadata, or {advice}")
    if checkpoint and license != checkpoint.license.lower():
        raise LicenseError(
            f"the card of {folder} says {license}, the release {checkpoint.license}; mend it, or {advice}"
        )
    if not re.fullmatch(REDISTRIBUTABLE, license):
        raise LicenseError(f"the licence {license} of {folder} forbids passing it on, or is unknown; {advice}")
    if origin.license and license != origin.license.lower():
        raise LicenseError(
            f"the card of {folder} states the licence {license}, its config.json {origin.license}; correct one, "
            f"or {advice}"
        )
    if (parent := catalog.load().checkpoints.get(origin.checkpoint or "")) and parent.license_note:
        raise LicenseError(
            f"{folder} derives from {parent.name}, whose licence is not plainly that of its weights "
            f"({parent.license}: {parent.license_note}); {advice}"
        )
    inherited = (origin.inherited_license or license).lower()
    if license != inherited and not re.fullmatch(PERMISSIVE, inherited):
        raise LicenseError(
            f"the card of {folder} states the licence {license}, but the weights that it derives from have "
            f"{inherited}, which may not allow it; {advice}"
        )


def make_plan(folder: Path, repo_id: str, revision: str = "main", private: bool = False) -> Plan:
    """Find out what publishing a folder would do.

    Args:
        folder: The model folder.
        repo_id: Where to publish it, as ORG/NAME.
        revision: Branch.
        private: Whether a repository that has to be made is to be private.

    Returns:
        The plan.

    Raises:
        InputError: The Hub cannot be asked.
    """
    api, branches = HfApi(), False
    info: ModelInfo | None
    with plainly(repo_id):
        try:
            info = patiently(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
        except RevisionNotFoundError:  # a branch that starts from main
            info, branches = patiently(lambda: api.model_info(repo_id, files_metadata=True)), True
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
    return Plan(repo_id, revision, info is None, branches, is_private, info.sha if info else None, uploads)


def make_plan_or_guess(folder: Path, repo_id: str, revision: str = "main", private: bool = False) -> tuple[Plan, str]:
    """Do as `make_plan`, also where the Hub is out of reach.

    Returns:
        The plan, and why the Hub could not be asked; "" where it could.

    Raises:
        InputError: As `make_plan`, but for a Hub that is out of reach.
    """
    try:
        return make_plan(folder, repo_id, revision, private), ""
    except OutOfReachError as error:
        paths = [(name, folder / name) for name in files_of(folder)]
        uploads = [Upload(name, path.stat().st_size, sha256_of(path), "unknown") for name, path in paths]
        return Plan(repo_id, revision, False, False, private, None, uploads), str(error)


def check_weights(plan: Plan, force: bool) -> None:
    """Refuse to put a weight in the place of a different one.

    Raises:
        InputError: That would happen, and nobody has said `--force`.
    """
    if not (force or plan.branches) and any(
        upload.path == WEIGHTS and upload.state == "changed" for upload in plan.uploads
    ):
        raise InputError(
            f"{plan.repo_id} has another {WEIGHTS} at {plan.revision}, which would be overwritten; "
            "publish to another repository, propose it by --create-pr, or say --force"
        )


def publish(folder: Path, plan: Plan, create_pr: bool = False, force: bool = False) -> str:
    """Publish a folder, in one commit.

    An answer that is lost on the way is no harm: before anything is repeated, the Hub is asked
    whether it has happened.

    Args:
        folder: The model folder.
        plan: What `make_plan` found.
        create_pr: Propose it as a pull request.
        force: Overwrite a different weight.

    Returns:
        What was done, in words with a URL.

    Raises:
        InputError: It cannot be done.
    """
    repo_id, revision, private, api = plan.repo_id, plan.revision, plan.private, HfApi()

    def again() -> Plan:
        new = make_plan(folder, repo_id, revision, private)
        if private and not new.private:
            raise InputError(f"{repo_id} has become public meanwhile; nothing was sent")
        return new

    start = time.monotonic()
    with plainly(repo_id):
        if plan.creates:
            patiently(lambda: api.create_repo(repo_id, private=plan.private, exist_ok=True))
            plan = again()  # it starts with a commit of its own, and somebody may have been quicker
        if plan.branches and not create_pr:
            patiently(lambda: api.create_branch(repo_id, branch=plan.revision, exist_ok=True))
            force = True  # what is on the new branch is main's, and stays there
        for attempt in range(TRIES):
            if not create_pr:
                check_weights(plan, force)
            if not plan.sent:
                return f"published: {repo_id}" if attempt else f"{repo_id} has it all already"
            title = _title(folder, plan)
            if create_pr and (url := _pull_request(repo_id, title)):
                return f"proposed already: {url}"
            try:
                done = _commit(api, folder, plan, title, create_pr)
            except HTTPError as error:
                temporary = is_temporary(error) or status_of(error) == 412
                if attempt == TRIES - 1 or time.monotonic() - start > LONGEST or not temporary:
                    raise
                time.sleep(2**attempt)
                plan = again()
                continue
            return f"proposed: {done.pr_url}" if create_pr else f"published: {done.commit_url}"
    raise AssertionError("unreachable")


def _title(folder: Path, plan: Plan) -> str:
    """Return the commit's title, which tells by a few digits of a hash what it is that is uploaded."""
    content = "".join(f"{upload.path} {upload.sha256}\n" for upload in plan.sent)
    files = f"{len(plan.sent)} file{'s' if len(plan.sent) > 1 else ''}"
    return f"Upload {folder.resolve().name}, {files} ({hashlib.sha256(content.encode()).hexdigest()[:10]})"


def _commit(api: HfApi, folder: Path, plan: Plan, title: str, create_pr: bool) -> CommitInfo:
    operations = [CommitOperationAdd(upload.path, folder / upload.path) for upload in plan.sent]
    try:
        return api.create_commit(
            plan.repo_id,
            operations,
            commit_message=title,
            revision=None if create_pr else plan.revision,
            create_pr=create_pr,
            parent_commit=plan.head,
        )
    except ValueError as error:
        raise InputError(f"the Hub refuses the card of {folder}: {one_line(error)}") from error
    except RuntimeError as error:  # what the client makes of an upload to LFS that failed, after its own retries
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError | HTTPError):
            raise cause from error
        raise InputError(f"cannot upload {folder}: {one_line(error)}; run it again to go on") from error


def _pull_request(repo_id: str, title: str) -> str | None:
    """Return the URL of an open pull request of that title, if there is one."""
    found = patiently(lambda: list(HfApi().get_repo_discussions(repo_id, discussion_type="pull_request")))
    return next((d.url for d in found if d.title == title and d.status in ("open", "draft")), None)


def add_to_collection(repo_id: str, title: str = COLLECTION, private: bool = False) -> str:
    """Add a repository to the collection of the family, which is made if there is none.

    Args:
        repo_id: The repository; the collection is its owner's.
        title: The collection's title.
        private: Whether a collection that has to be made is to be private. One that is there stays
            as it is: on the Hub a public one shows private repositories to those who may see them.

    Returns:
        The collection's slug.

    Raises:
        InputError: The Hub refuses it.
    """
    owner, api = repo_id.partition("/")[0], HfApi()
    with plainly(repo_id):
        found = [c for c in patiently(lambda: list(api.list_collections(owner=owner))) if c.title == title]
        collection = found[0] if found else None
        if collection is None:
            description = "Res2Net models (arXiv:1904.01169) with provenance, licence and published accuracies."
            collection = patiently(
                lambda: api.create_collection(
                    title, namespace=owner, description=description, private=private, exists_ok=True
                )
            )
        slug = collection.slug
        patiently(lambda: api.add_collection_item(slug, repo_id, "model", exists_ok=True))
    return slug
