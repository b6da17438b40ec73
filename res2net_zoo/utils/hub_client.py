"""Access to the Hub with retries, one-line errors and verification of hashes."""

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
LONGEST = 60  # seconds after which a failing call is not retried

http.install()


class HubUnavailableError(InputError):
    """The Hub is temporarily not reachable."""


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error; None if there was no response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def with_retries(call: Callable[[], T]) -> T:
    """Make a request to the Hub and retry temporary failures; huggingface_hub retries only some requests.

    Args:
        call: Makes the request; must be idempotent.

    Returns:
        The result of `call`.

    Raises:
        HTTPError: The request failed permanently, or in every attempt.
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
    """Return whether a failed request may succeed if retried."""
    status = status_of(error)
    if status is None:
        return True
    return (status in (408, 429) or status >= 500) and seconds_to_wait(error) <= http.LONGEST_WAIT


def seconds_to_wait(error: BaseException) -> int:
    """Return how many seconds the server asks to wait before a retry; 0 if it does not ask."""
    response = getattr(error, "response", None)
    return 0 if response is None else http.asked_to_wait(response)


def cause_of(error: BaseException) -> str:
    """Return the connection error that caused an error, on one line; "" if there is none."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HTTPError) and not isinstance(found, LocalEntryNotFoundError):
            return one_line(found)
        found = found.__cause__ or found.__context__
    return ""


def download(url: str, path: Path, headers: dict[str, str] | None = None, size: int | None = None) -> None:
    """Download a file, resuming a partial download.

    Args:
        url: The URL.
        path: The file to write; existing content is taken as the beginning of the download.
        headers: Additional request headers.
        size: Expected size in bytes, if known.

    Raises:
        InputError: The download fails.
    """
    name = shown(url)
    if not urllib.parse.urlsplit(url).hostname:
        raise InputError(f"{name} is not a URL that can be downloaded")

    def resume() -> None:
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
                if error.response.status_code != 416:  # the file is already complete
                    raise

    try:
        with_retries(resume)
    except OfflineModeIsEnabled as error:
        raise InputError(f"cannot download {name}: HF_HUB_OFFLINE is set; unset it") from error
    except HTTPError as error:
        advice = "; run it again to continue" if is_temporary(error) else ""
        raise InputError(f"cannot download {name}: {one_line(error)}{advice}") from error
    except OSError as error:
        if error.errno is not None:
            reason = error.strerror or error
            raise InputError(f"cannot write {path}: {reason}; free some space and run it again to continue") from error
        # Raised by huggingface_hub if the size is wrong.
        path.unlink(missing_ok=True)
        raise InputError(f"the download from {name} does not have the expected size; run it again") from error


def shown(url: str) -> str:
    """Return a URL without parts that may be secret: user, password, query and fragment."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def identity(url: str) -> str | None:
    """Return digits that identify the version of a file at a URL, from its headers; None if there are none."""
    with contextlib.suppress(HTTPError, OfflineModeIsEnabled, ValueError):
        response = get_session().head(url, follow_redirects=True)
        known = [response.headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length")]
        if response.status_code == 200 and any(known[:2]):
            return hashlib.sha256(" ".join(known).encode()).hexdigest()[:16]
    return None


def assets(namespace: str, name: str, cache_dir: str | Path | None = None) -> Path:
    """Return a folder in huggingface_hub's assets cache, and create it if necessary.

    Raises:
        InputError: The folder cannot be created or is not writable.
    """
    try:
        folder = cached_assets_path("res2net_zoo", namespace, name, assets_dir=cache_dir)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return folder
    except (OSError, ValueError) as error:
        where = cache_dir or constants.HF_ASSETS_CACHE
        reason = f"{one_line(error)}; set HF_HOME to another folder"
        raise InputError(f"cannot write into the cache {where}: {reason}") from error


@contextlib.contextmanager
def readable_errors(repo_id: str) -> Iterator[None]:
    """Replace errors of huggingface_hub and of the connection by one-line messages with advice.

    Args:
        repo_id: The repository, as ORG/NAME.

    Raises:
        InputError: The request failed.
    """
    try:
        yield
    except GatedRepoError as error:
        raise InputError(f"{repo_id} is gated: request access on its page, and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {repo_id} on the Hub, or it is private and you are not logged in (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo_id}: revision not found: {one_line(error)}") from error
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a repository id ORG/NAME: {one_line(error)}") from error
    except LocalEntryNotFoundError as error:
        cause = cause_of(error)
        raise HubUnavailableError(
            f"cannot download {repo_id} from {constants.ENDPOINT}{f': {cause}' if cause else ''}; run it again to "
            "continue"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubUnavailableError(f"HF_HUB_OFFLINE is set, so {repo_id} cannot be reached; unset it") from error
    except HTTPError as error:
        reasons = {
            401: "you are not logged in; log in with `hf auth login`, or set HF_TOKEN",
            403: "your token lacks the permission; log in with another one (`hf auth login`)",
            429: "too many requests; run it again in some minutes",
        }
        status = status_of(error)
        if status is None:
            reason = f"cannot reach {constants.ENDPOINT}: {one_line(error)}; run it again to continue"
        elif (seconds := seconds_to_wait(error)) > http.LONGEST_WAIT:
            reason = (
                f"the Hub asks to wait {seconds:,} s (Retry-After), longer than the limit of {http.LONGEST_WAIT} s; "
                "run it again later to continue"
            )
        elif status >= 500:
            reason = f"the Hub reports an internal error (status {status}); run it again later to continue"
        else:
            reason = f"the Hub refused {repo_id}: {reasons.get(status) or one_line(error)}"
        unavailable = status is None or status in (408, 429) or status >= 500
        raise (HubUnavailableError if unavailable else InputError)(reason) from error
    except (OSError, ValueError) as error:
        # A full disk or a read-only cache; huggingface_hub wraps some of these errors in a ValueError.
        where = constants.HF_HUB_CACHE
        raise InputError(f"cannot store {repo_id} in the cache {where}: {one_line(error)}") from error


def check_cached(hub_id: str, filename: str, cache_dir: str | Path | None = None, sha256: str = "") -> None:
    """Verify the hash of a file in the Hub's cache, once, and remove the file if it is wrong.

    huggingface_hub checks only the size. Files in its cache are named by their SHA-256.

    Args:
        hub_id: The repository, as ORG/NAME or ORG/NAME@REVISION.
        filename: The name of the file in the repository.
        cache_dir: Cache folder; default huggingface_hub's.
        sha256: Expected SHA-256; "" to rely on the Hub's.

    Raises:
        InputError: The hash is wrong. A damaged file is removed from the cache.
    """
    repo_id, _, revision = hub_id.partition("@")
    link = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision or None)
    if not isinstance(link, str):
        return
    blob = Path(link).resolve()
    named = blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else ""  # without links there is no hash
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
        with contextlib.suppress(OSError):  # with a read-only cache, the hash is computed every time
            write_atomically(mark, lambda path: path.write_text(f"{digest} {stamp}"))
    if named and digest != named:
        forget(Path(link))
        raise InputError(
            f"the download of {filename} of {hub_id} has the SHA-256 {digest}, not the Hub's {named}; "
            "it is removed from the cache: run it again"
        )
    if sha256 and digest != sha256:
        raise InputError(
            f"{filename} of {hub_id} has the SHA-256 {digest}, the catalogue records {sha256}: the file on the Hub "
            "has changed; name an earlier revision as hf-hub:ORG/NAME@REVISION"
        )


SIGNATURE = "model.sig"

# The files of an unsigned model folder; pickles are not downloaded.
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
    SIGNATURE,
    "LICENSE*",
    "NOTICE*",
)


def model_info(repo_id: str, revision: str | None = None) -> ModelInfo:
    """Return the Hub's information about a repository, including the commit of a revision.

    Raises:
        InputError: The request fails, or the repository or the revision does not exist.
    """
    with readable_errors(repo_id):
        return with_retries(lambda: HfApi().model_info(repo_id, revision=revision))


def snapshot(repo_id: str, revision: str | None = None, everything: bool = False) -> Path:
    """Download a repository's files to the Hub's cache and verify their hashes.

    Args:
        repo_id: The repository, as ORG/NAME.
        revision: Branch, tag or commit; main by default.
        everything: Download all files, which a signature covers, rather than those of `WANTED`.

    Returns:
        The folder in the cache, named by its commit.

    Raises:
        InputError: The download fails, or a hash is wrong; such a file is removed from the cache.
    """
    sha = model_info(repo_id, revision).sha  # a branch may move between requests
    with readable_errors(repo_id):
        patterns = None if everything else list(WANTED)
        folder = Path(with_retries(lambda: snapshot_download(repo_id, revision=sha, allow_patterns=patterns)))
        report = with_retries(lambda: HfApi().verify_repo_checksums(repo_id, revision=sha, cache_dir=folder.parents[2]))
    for mismatch in report.mismatches:
        forget(folder / mismatch["path"])
    if report.mismatches:
        first = report.mismatches[0]
        raise InputError(
            f"{first['path']} of {repo_id} has the hash {first['actual']}, not the Hub's {first['expected']}; "
            "it is removed from the cache: run it again"
        )
    return folder


def is_blob_of(folder: Path, target: Path) -> bool:
    """Return whether a file is one of those that a snapshot in the Hub's cache links to.

    Its links are models--ORG--NAME/snapshots/COMMIT/FILE to models--ORG--NAME/blobs.

    Args:
        folder: The snapshot, or another folder; resolved.
        target: The file; resolved.
    """
    return folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"


def forget(link: Path) -> None:
    """Remove a file from the Hub's cache: its name in a snapshot, and its content."""
    for path in (link.resolve(), link):
        with contextlib.suppress(OSError):
            path.unlink()


def fetch_repository(repo_id: str, sha: str, folder: Path) -> None:
    """Download a repository's files to a folder, resuming an earlier call; all files if it is signed, else `WANTED`.

    Args:
        repo_id: The repository, as ORG/NAME.
        sha: The commit.
        folder: The folder; complete files in it are not downloaded again.

    Raises:
        InputError: A download fails, or a hash is wrong; such a file is removed.
    """
    with readable_errors(repo_id):
        entries = with_retries(lambda: list(HfApi().list_repo_tree(repo_id, revision=sha, recursive=True)))
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    if SIGNATURE not in files:  # it covers all files
        files = {name: files[name] for name in filter_repo_objects(files, allow_patterns=list(WANTED))}
    for path in [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part"]:
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()  # from an earlier commit
    for name in files:
        entry, path = files[name], folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{repo_id} has a file {name!r}, which is outside of the folder; do not trust it")
        expected = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if path.is_file() and hash_of(path, bool(entry.lfs)) == expected:
            continue
        part = path.with_name(f"{path.name}.{expected[:16]}.part")  # resumed only for the same content
        part.parent.mkdir(parents=True, exist_ok=True)
        download(hf_hub_url(repo_id, name, revision=sha), part, build_hf_headers(), entry.size)
        if (digest := hash_of(part, bool(entry.lfs))) != expected:
            part.unlink()
            raise InputError(f"{name} of {repo_id} has the hash {digest}, not the Hub's {expected}; run it again")
        part.replace(path)


def hash_of(path: Path, lfs: bool) -> str:
    """Return the hash that the Hub uses for a file: SHA-256 in LFS, otherwise git's blob id."""
    return sha256_of(path) if lfs else git_hash(read_bytes(path, path.stat().st_size))
