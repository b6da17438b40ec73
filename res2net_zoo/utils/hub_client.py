"""Talking to the Hub: patience where its client has none, plain words for what goes wrong, and hashes."""

import contextlib
import errno
import hashlib
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    HfApi,
    ModelInfo,
    cached_assets_path,
    constants,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session
from huggingface_hub.utils.sha import git_hash

from res2net_zoo.utils import http
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import read_bytes, sha256_of, write_atomically

T = TypeVar("T")

TRIES = 4
LONGEST = 60  # seconds of failing after which a call is not tried again

http.install()


class OutOfReachError(InputError):
    """The Hub cannot be asked now; another time it may answer."""


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def patiently(call: Callable[[], T]) -> T:
    """Call the Hub, and again where it is busy or its answer is lost; its client does so in some calls only.

    Args:
        call: What to do; must be right to do twice.

    Returns:
        What it returned.

    Raises:
        HTTPError: It failed for good, or every time.
    """
    start = time.monotonic()
    for attempt in range(TRIES):
        try:
            return call()
        except HTTPError as error:
            last = attempt == TRIES - 1 or time.monotonic() - start > LONGEST
            last = last or isinstance(error, http.SilentServerError)
            if last or not is_temporary(error):
                raise
            time.sleep(seconds_to_wait(error) or 2**attempt)
    raise AssertionError("unreachable")


def is_temporary(error: BaseException) -> bool:
    """Return whether what failed may work a moment later."""
    status = status_of(error)
    if status is None:
        return True
    return (status in (408, 429) or status >= 500) and seconds_to_wait(error) <= http.LONGEST_WAIT


def seconds_to_wait(error: BaseException) -> int:
    """Return for how many seconds a server asks to be left alone; 0 where it does not."""
    response = getattr(error, "response", None)
    return 0 if response is None else http.asked_to_wait(response)


def cause_of(error: BaseException) -> str:
    """Return what a connection failed of, on one line; "" where that is not what an error is from."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HTTPError) and not isinstance(found, LocalEntryNotFoundError):
            return one_line(found)
        found = found.__cause__ or found.__context__
    return ""


def download(url: str, path: Path, headers: dict[str, str] | None = None, size: int | None = None) -> None:
    """Download a file, going on where a connection, or an earlier call, broke off.

    Args:
        url: Where it is.
        path: Where to put it; what is there already is taken for its beginning.
        headers: What else to tell the server.
        size: How many bytes there should be, if known.

    Raises:
        InputError: It cannot be had.
    """
    name = shown(url)
    if not urllib.parse.urlsplit(url).hostname:
        raise InputError(f"{name} is no URL that can be downloaded")

    def go_on() -> None:
        done = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            try:
                http_get(
                    url,
                    file,
                    resume_size=done,
                    headers=headers,
                    expected_size=size,
                    displayed_filename=name.rpartition("/")[2],
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 416:  # nothing is left to be fetched
                    raise

    try:
        patiently(go_on)
    except OfflineModeIsEnabled as error:
        raise InputError(f"cannot download {name}: HF_HUB_OFFLINE is set; unset it") from error
    except HTTPError as error:
        advice = "; run it again to go on" if is_temporary(error) else ""
        raise InputError(f"cannot download {name}: {one_line(error)}{advice}") from error
    except OSError as error:
        if error.errno is not None:
            reason = error.strerror or error
            raise InputError(f"cannot write {path}: {reason}; make room and run it again to go on") from error
        # The client's own: there are fewer bytes than there should be, or more.
        path.unlink(missing_ok=True)
        raise InputError(f"what came from {name} has not the size that it should have; run it again") from error


def shown(url: str) -> str:
    """Return a URL without what may be a secret: user, password, query and fragment."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def identity(url: str) -> str | None:
    """Return some digits that stay the same as long as a server has the same file at a URL, None if it does not say."""
    with contextlib.suppress(HTTPError, OfflineModeIsEnabled, ValueError):
        response = get_session().head(url, follow_redirects=True)
        known = [response.headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length")]
        if response.status_code == 200 and any(known[:2]):
            return hashlib.sha256(" ".join(known).encode()).hexdigest()[:16]
    return None


def assets(namespace: str, name: str, cache_dir: str | Path | None = None) -> Path:
    """Return a folder of ours in huggingface_hub's assets cache, made if it is not there.

    Raises:
        InputError: It cannot be made.
    """
    try:
        folder = cached_assets_path("res2net_zoo", namespace, name, assets_dir=cache_dir)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return folder
    except (OSError, ValueError) as error:
        where = cache_dir or constants.HF_ASSETS_CACHE
        raise InputError(f"cannot write into the cache {where}: {one_line(error)}; set HF_HOME to another") from error


@contextlib.contextmanager
def plainly(repo_id: str) -> Iterator[None]:
    """Turn what can go wrong with a repository into one line that says what to do.

    Args:
        repo_id: The repository, as ORG/NAME.

    Raises:
        InputError: In place of an error of the client or the connection.
    """
    try:
        yield
    except GatedRepoError as error:
        raise InputError(f"{repo_id} is gated: ask for access on its page, and log in by `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {repo_id} on the Hub, or it is private and you are not logged in (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo_id} has no such revision: {one_line(error)}") from error
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no repository id ORG/NAME: {one_line(error)}") from error
    except LocalEntryNotFoundError as error:
        cause = cause_of(error)
        raise OutOfReachError(
            f"cannot fetch {repo_id} from {constants.ENDPOINT}{f': {cause}' if cause else ''}; run it again to go on"
        ) from error
    except OfflineModeIsEnabled as error:
        raise OutOfReachError(f"HF_HUB_OFFLINE is set, so {repo_id} cannot be reached; unset it") from error
    except HTTPError as error:
        reasons = {
            401: "the Hub does not know you; log in by `hf auth login`, or set HF_TOKEN",
            403: "your token may not do this there; log in by one that may (`hf auth login`)",
            429: "the Hub asks for patience (too many requests); run it again in some minutes",
        }
        status = status_of(error)
        if status is None:
            reason = f"cannot reach {constants.ENDPOINT}: {one_line(error)}; run it again to go on"
        elif (seconds := seconds_to_wait(error)) > http.LONGEST_WAIT:
            reason = (
                f"the Hub asks to wait {seconds:,} s (Retry-After), longer than the limit of {http.LONGEST_WAIT} s; "
                "run it again later to go on"
            )
        elif status >= 500:
            reason = f"the Hub is out of order (status {status}); run it again later to go on"
        else:
            reason = f"the Hub refused {repo_id}: {reasons.get(status) or one_line(error)}"
        unavailable = status is None or status in (408, 429) or status >= 500
        raise (OutOfReachError if unavailable else InputError)(reason) from error
    except (OSError, ValueError) as error:
        # A full disk, a cache that cannot be written; some of it the client wraps in a type of no meaning.
        where = constants.HF_HUB_CACHE
        raise InputError(f"cannot keep {repo_id} in the cache {where}: {one_line(error)}") from error


def check_cached(hub_id: str, filename: str, cache_dir: str | Path | None = None, sha256: str = "") -> None:
    """Hold a weight that lies in the Hub's cache against its hash, once; remove it if it is another.

    The client checks only its size. The Hub's cache names such a file by its SHA-256.

    Args:
        hub_id: The repository, as ORG/NAME or ORG/NAME@REVISION.
        filename: The file's name there.
        cache_dir: Where the cache is, if not in its usual place.
        sha256: What its hash must be, "" where only the Hub's own word counts.

    Raises:
        InputError: Its bytes are not those that they should be; then it is no longer in the cache.
    """
    repo_id, _, revision = hub_id.partition("@")
    link = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision or None)
    if not isinstance(link, str):
        return
    blob = Path(link).resolve()
    named = blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else ""  # not where a file system has no links
    stat = blob.stat()
    stamp = f"{stat.st_size} {stat.st_mtime_ns}"
    key = hashlib.sha256(str(blob).encode()).hexdigest()[:32]
    mark = Path(constants.HF_ASSETS_CACHE) / "res2net_zoo" / "checked" / key / "sha256"
    try:
        digest, seen = mark.read_text().split(" ", 1)
    except (OSError, ValueError):
        digest, seen = "", ""
    if seen != stamp:
        digest = sha256_of(blob)
        with contextlib.suppress(OSError):  # a cache that cannot be written is checked every time
            write_atomically(mark, lambda path: path.write_text(f"{digest} {stamp}"))
    if named and digest != named:
        forget(Path(link))
        raise InputError(
            f"what came as {filename} of {hub_id} has the SHA-256 {digest}, not the Hub's {named}; "
            "it is removed from the cache: run it again"
        )
    if sha256 and digest != sha256:
        raise InputError(
            f"{filename} of {hub_id} has the SHA-256 {digest}, the catalogue records {sha256}: somebody has changed "
            "it there; name an earlier revision as hf-hub:ORG/NAME@REVISION"
        )


# Of a repository what a model folder has, and no pickles.
WANTED = (
    WEIGHTS,
    f"*/{WEIGHTS}",
    "*.json",
    "*.md",
    "*.txt",
    "*.csv",
    "*.yaml",
    "*.toml",
    "*.png",
    "*.jpg",
    "LICENSE*",
    "NOTICE*",
)


def describe(repo_id: str, revision: str | None = None) -> ModelInfo:
    """Ask the Hub what a repository is, and which commit a revision of it.

    Raises:
        InputError: It cannot be asked, or has no such repository or revision.
    """
    with plainly(repo_id):
        return patiently(lambda: HfApi().model_info(repo_id, revision=revision))


def snapshot(repo_id: str, revision: str | None = None) -> Path:
    """Fetch a repository's files into the Hub's cache, and hold them against the Hub's hashes.

    Args:
        repo_id: The repository, as ORG/NAME.
        revision: Branch, tag or commit; main by default.

    Returns:
        The folder in the cache, named by its commit.

    Raises:
        InputError: It cannot be had, or came with wrong bytes; what is wrong does not stay in the cache.
    """
    sha = describe(repo_id, revision).sha  # a name could lead to another commit a moment later
    with plainly(repo_id):
        folder = Path(patiently(lambda: snapshot_download(repo_id, revision=sha, allow_patterns=list(WANTED))))
        report = patiently(lambda: HfApi().verify_repo_checksums(repo_id, revision=sha, cache_dir=folder.parents[2]))
    for mismatch in report.mismatches:
        forget(folder / mismatch["path"])
    if report.mismatches:
        first = report.mismatches[0]
        raise InputError(
            f"{first['path']} of {repo_id} came with the hash {first['actual']}, not the Hub's {first['expected']}; "
            "it is removed from the cache: run it again"
        )
    return folder


def forget(link: Path) -> None:
    """Remove a file from the Hub's cache: its name in a snapshot, and its content."""
    for path in (link.resolve(), link):
        with contextlib.suppress(OSError):
            path.unlink()


def fetch_repository(repo_id: str, sha: str, folder: Path) -> None:
    """Fetch a repository's files into a folder, going on where an earlier call broke off.

    Args:
        repo_id: The repository, as ORG/NAME.
        sha: Commit.
        folder: Where to put them; whole files that are there already are not fetched again.

    Raises:
        InputError: One cannot be had, or came with wrong bytes; then that one is not there.
    """
    with plainly(repo_id):
        entries = patiently(lambda: list(HfApi().list_repo_tree(repo_id, revision=sha, recursive=True)))
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    files = {name: files[name] for name in filter_repo_objects(files, allow_patterns=list(WANTED))}
    for path in [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part"]:
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()  # of an earlier commit
    for name in files:
        entry, path = files[name], folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{repo_id} has a file {name!r}, which lies outside of it; do not trust it")
        expected = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if path.is_file() and hash_of(path, bool(entry.lfs)) == expected:
            continue
        part = path.with_name(f"{path.name}.{expected[:16]}.part")  # of other content it would not be the beginning
        part.parent.mkdir(parents=True, exist_ok=True)
        download(hf_hub_url(repo_id, name, revision=sha), part, build_hf_headers(), entry.size)
        if (digest := hash_of(part, bool(entry.lfs))) != expected:
            part.unlink()
            raise InputError(f"{name} of {repo_id} came with the hash {digest}, not the Hub's {expected}; run it again")
        part.replace(path)


def hash_of(path: Path, lfs: bool) -> str:
    """Return the hash by which the Hub knows a file: its SHA-256 in LFS, else the id of git's object."""
    return sha256_of(path) if lfs else git_hash(read_bytes(path, path.stat().st_size))
