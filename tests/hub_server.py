"""A test Hub on loopback with repositories and collections, for the real clients over HTTP.

It does not support Xet: set HF_HUB_DISABLE_XET=1 before huggingface_hub is imported.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

# Write permission: the first token for the namespaces "zoo" and "zoo-org", the second for "other", the third for none.
TOKEN, OTHER_TOKEN, READ_TOKEN = "hf_owner", "hf_other", "hf_read"
LARGE = 10 * 2**20  # larger files must be in LFS
LARGE_TYPES = ("bin", "gz", "h5", "npy", "npz", "onnx", "parquet", "pickle", "pt", "pth", "safetensors", "tar", "zip")
ATTRIBUTES = "".join(f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in LARGE_TYPES).encode()


class User(NamedTuple):
    """Owner and permissions of a token."""

    name: str
    organizations: tuple[str, ...] = ()
    role: str = "write"


@dataclass(frozen=True)
class File:
    """The content of a file, and its ids in git and LFS."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def in_git(self) -> bytes:
        """Content in git: the file, or an LFS pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.lfs else self.content

    @cached_property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def lfs_info(self, sha_key: str) -> dict[str, Any]:
        info = {sha_key: self.sha256, "size": len(self.content), "pointerSize": len(self.in_git)}
        return {"lfs": info} if self.lfs else {}


class Commit(NamedTuple):
    """An immutable state of a repository."""

    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass
class Repository:
    """Commits by sha, and branches, tags and pull requests."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main", "refs/tags/v1", "refs/pr/1"
    pulls: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, File] = field(default_factory=dict)  # LFS content by its sha256

    def name_of(self, revision: str) -> str | None:
        names = [revision, f"refs/heads/{revision}", f"refs/tags/{revision}"]
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(self.name_of(revision) or "", revision))

    def history(self, revision: str) -> Iterator[Commit]:
        commit = self.find(revision)
        while commit:
            yield commit
            commit = self.commits.get(commit.parent or "")


class Refused(Exception):
    """An error response, with the headers by which the client distinguishes errors."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        self.status, self.value = status, {"error": message, **more}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass
class Fault:
    """An injected fault in the next requests whose "METHOD /path" contains a pattern."""

    kind: str
    pattern: str
    times: float
    after: int
    value: Any  # depends on the kind: a status, position, seconds or function
    headers: dict[str, str] = field(default_factory=dict)
    reset: bool = False  # reset the connection instead of closing it


def is_large(path: str, size: int, sample: bytes) -> bool:
    return size > LARGE or path.rsplit(".", 1)[-1] in LARGE_TYPES or b"\0" in sample


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


class Hub:
    """Content, received requests and injected faults of the server. Keys of repositories: "models/ORG/NAME"."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.users = {
            TOKEN: User("zoo", ("zoo-org",)),
            OTHER_TOKEN: User("other"),
            READ_TOKEN: User("zoo", ("zoo-org",), role="read"),
        }
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []  # "METHOD /path", unquoted and without its query
        self.senders: list[str | None] = []  # user of each request; never a token
        self.faults: list[Fault] = []  # remaining faults
        self.errors: list[str] = []  # errors of this server itself, which a client would retry
        self.page_size = 1000
        self.redirect = True  # send LFS content from another origin, as the Hub does
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()

    def add(
        self, key: str, content: Path | Mapping[str, bytes | str] | None = None, private: bool = False, **commit: Any
    ) -> str:
        """Commit a folder or mapping to a repository, created if necessary; return the sha."""
        with self.lock:
            self.repositories.setdefault(key, Repository(private))
            if isinstance(content, Path):
                paths = [path for path in sorted(content.rglob("*")) if path.is_file()]
                content = {path.relative_to(content).as_posix(): path.read_bytes() for path in paths}
            return self.commit(key, content or {}, **commit)

    def commit(
        self,
        key: str,
        add: Mapping[str, bytes | str | File],
        delete: Iterable[str] = (),
        revision: str = "main",
        title: str = "Upload",
        description: str = "",
        author: str = "zoo",
        parent: str | None = None,
    ) -> str:
        """Add a commit to a branch, created if necessary; return the sha."""
        with self.lock:
            repository = self.repositories[key]
            before = repository.find(parent or revision)
            files = {path: file for path, file in (before.files if before else {}).items() if path not in set(delete)}
            for path, value in add.items():
                if not isinstance(value, File):
                    value = value.encode() if isinstance(value, str) else value
                    value = File(value, bool(value) and is_large(path, len(value), value[:512]))
                if value.lfs:
                    repository.objects.setdefault(value.sha256, value)
                files[path] = value
            listing = sorted((path, file.blob_id) for path, file in files.items())
            sha = hashlib.sha1(json.dumps([key, len(repository.commits), title, listing]).encode()).hexdigest()
            frozen, below = MappingProxyType(dict(sorted(files.items()))), before.sha if before else None
            repository.commits[sha] = Commit(sha, below, title, description, author, today(), frozen)
            repository.refs[repository.name_of(revision) or f"refs/heads/{revision}"] = sha
            return sha

    def tag(self, key: str, name: str, revision: str = "main") -> None:
        with self.lock:
            self.repositories[key].refs[f"refs/tags/{name}"] = self.sha(key, revision)

    def sha(self, key: str, revision: str = "main") -> str:
        return self.commits(key, revision)[0].sha

    def commits(self, key: str, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, newest first."""
        with self.lock:
            return list(self.repositories[key].history(revision))

    def files(self, key: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits(key, revision)[0].files.items()}

    def open_pull(self, key: str, title: str, description: str, author: str, parent: str) -> dict[str, Any]:
        repository = self.repositories[key]
        number = len(repository.pulls) + 1
        pull = dict(num=number, title=title, author={"name": author}, createdAt=today(), status="open", events=[])
        pull |= dict(isPullRequest=True, repo={"name": key.split("/", 1)[1], "type": key.split("/")[0][:-1]})
        pull |= dict(changes={"base": "refs/heads/main"}, filesWithConflicts=[], diff="", description=description)
        repository.pulls.append(pull)
        repository.refs[f"refs/pr/{number}"] = parent
        return pull

    # Injected faults. All take `times` (default 1) and `after` (number of requests to serve first).

    def inject(self, kind: str, pattern: str, value: Any = None, times: float = 1, after: int = 0, **more: Any) -> None:
        self.faults.append(Fault(kind, pattern, times, after, value, **more))

    def fail(self, pattern: str, status: int = 503, headers: Mapping[str, str] | None = None, **when: Any) -> None:
        """Respond with an error, without any effect."""
        self.inject("fail", pattern, status, headers=dict(headers or {}), **when)

    def cut(self, pattern: str, at_byte: int = 0, reset: bool = False, **when: Any) -> None:
        """Close the connection within a body: of the response to a GET, otherwise of the request."""
        self.inject("cut", pattern, at_byte, reset=reset, **when)

    def corrupt(self, pattern: str, at_byte: int = 0, **when: Any) -> None:
        """Send one wrong byte in the response to a GET."""
        self.inject("corrupt", pattern, at_byte, **when)

    def drop_answer(self, pattern: str, **when: Any) -> None:
        """Process the request, and close the connection without a response."""
        self.inject("drop", pattern, **when)

    def delay(self, pattern: str, seconds: float, **when: Any) -> None:
        self.inject("before", pattern, lambda: time.sleep(seconds), **when)

    def before(self, pattern: str, action: Callable[[], object], **when: Any) -> None:
        """Call a function just before a request is served, such as a concurrent commit."""
        self.inject("before", pattern, action, **when)

    def take(self, kind: str, request: str, size: int | None = None) -> Fault | None:
        """Return the fault to apply; none if its position is beyond the end of the body."""
        with self.lock:
            for fault in [fault for fault in self.faults if fault.kind == kind and re.search(fault.pattern, request)]:
                if size is not None and fault.value >= size:
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
                return fault
        return None


ROUTES: list[tuple[str, re.Pattern[str], Callable]] = []
REPOSITORY = r"/api/((?:models|datasets|spaces)/[^/]+/[^/]+)"
COLLECTION = r"/api/collections/([^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Register a handler method for requests; it receives the groups of the pattern, unquoted."""

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Handler(http.server.BaseHTTPRequestHandler):
    """Handles requests of `huggingface_hub` and `datasets`."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise kept connections wait 40 ms between header and body
    user: User | None
    body: bytes
    query: dict[str, list[str]]

    def do_GET(self) -> None:
        hub, (path, _, query) = self.hub, self.path.partition("?")
        self.line = f"{self.command} {urllib.parse.unquote(path)}"
        self.query = urllib.parse.parse_qs(query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = hub.users.get(token)
        with hub.lock:
            hub.requests.append(self.line)
            hub.senders.append(self.user.name if self.user else None)
        try:
            if not self.read_body():
                return
            while fault := hub.take("before", self.line):
                fault.value()
            if fault := hub.take("fail", self.line):
                return self.send(fault.value, {"error": "a planned fault"}, fault.headers)
            with hub.lock:
                if token and not self.user:
                    raise Refused(401, "Invalid credentials in Authorization header")
                for method, pattern, function in ROUTES:
                    if method == self.command.replace("HEAD", "GET") and (match := pattern.fullmatch(path)):
                        answer = function(self, *(urllib.parse.unquote(group or "") for group in match.groups()))
                        break
                else:
                    raise Refused(404, "Sorry, we can't find the page you are looking for.")
            if hub.take("drop", self.line):
                return self.hang_up()
            self.send(*answer) if isinstance(answer, tuple) else self.send(200, answer)
        except Refused as refusal:
            self.send(refusal.status, refusal.value, refusal.headers)
        except ConnectionError:  # the client has disconnected
            self.close_connection = True
        except Exception as error:
            hub.errors.append(f"{self.line}: {error!r}")
            self.send(500, {"error": repr(error)})

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def read_body(self) -> bool:
        """Read the body of the request; return False if the connection was cut."""
        size = int(self.headers.get("Content-Length", 0))
        cut = self.hub.take("cut", self.line, size)
        self.body = self.rfile.read(cut.value if cut else size)
        if cut:
            self.hang_up(cut.reset)
        return cut is None and len(self.body) == size

    def send(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "GET" and (fault := self.hub.take("corrupt", self.line, len(content))):
            content = content[: fault.value] + bytes([content[fault.value] ^ 1]) + content[fault.value + 1 :]
        cut = self.hub.take("cut", self.line, len(content)) if self.command == "GET" else None
        if self.command != "HEAD":
            self.wfile.write(content[: cut.value] if cut else content)
        if cut:
            self.hang_up(cut.reset)

    def hang_up(self, reset: bool = False) -> None:
        self.close_connection = True
        if reset:  # a linger time of 0 resets the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    # Permissions.

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def url(self, key: str) -> str:
        return f"{self.hub.endpoint}/{key.removeprefix('models/')}"

    def owns(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user.name, *self.user.organizations)

    def may_write(self, namespace: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if not self.owns(namespace) or self.user.role != "write":
            raise Refused(403, f"Forbidden: you don't have the rights to write to {namespace}")

    def repository(self, key: str, write: bool = False) -> Repository:
        """Return a repository; private ones are hidden without permission, as on the Hub."""
        found, namespace = self.hub.repositories.get(key), key.split("/")[1]
        if found is None or (found.private and not self.owns(namespace)):
            # Only for https URLs the client interprets a 401 without this code as a missing repository.
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(namespace)
        return found

    def at(self, key: str, revision: str) -> Commit:
        if not (commit := self.repository(key).find(revision)):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def writable(self, key: str, revision: str) -> Commit:
        """Return the head to commit to. Everyone may open pull requests and add to their own."""
        repository, user = self.repository(key), self.user
        mine = [f"refs/pr/{pull['num']}" for pull in repository.pulls if user and pull["author"]["name"] == user.name]
        if "create_pr" not in self.query and revision not in mine:
            self.may_write(key.split("/")[1])
        elif user is None or user.role != "write":
            raise Refused(403 if user else 401, "Forbidden")
        return self.at(key, revision if repository.name_of(revision) else f"no branch {revision}")

    def page(self, items: list) -> tuple[int, list, dict[str, str]]:
        start, end = (begin := int(self.query.get("cursor", ["0"])[0])), begin + self.hub.page_size
        query = urllib.parse.urlencode({**self.query, "cursor": end}, doseq=True)
        link = f'<{self.hub.endpoint}{self.path.partition("?")[0]}?{query}>; rel="next"'
        return 200, items[start:end], {"Link": link} if end < len(items) else {}

    # Accounts and repositories.

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> object:
        if not self.user:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.user.role}
        organizations = [{"name": name, "type": "org"} for name in self.user.organizations]
        return dict(type="user", name=self.user.name, orgs=organizations, auth={"accessToken": token})

    @route("POST", "/api/repos/create")
    def create(self) -> object:
        owner = self.json.get("organization") or (self.user.name if self.user else "")
        key = f"{self.json.get('type') or 'model'}s/{owner}/{self.json['name']}"
        self.may_write(owner)
        if key.startswith("spaces/") and not self.json.get("sdk"):
            raise Refused(400, "sdk is required for a Space")
        if key in self.hub.repositories:
            raise Refused(409, "You already created this repo", url=self.url(key))
        private = self.json.get("visibility") == "private" or bool(self.json.get("private"))
        # As on the Hub, a new repository contains this file.
        self.hub.add(key, {".gitattributes": ATTRIBUTES}, private, title="initial commit")
        return {"url": self.url(key), "name": key.split("/", 1)[1]}

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> object:
        card = self.json["content"]
        if card.startswith("---") and not re.match(r"---\n.*?^---$", card, re.M | re.S):
            return 400, {"errors": [{"message": "metadata without an end"}], "warnings": []}
        return {"errors": [], "warnings": []}

    @route("POST", REPOSITORY + "/branch/(.+)")
    def create_branch(self, key: str, name: str) -> object:
        repository = self.repository(key, write=True)
        if repository.name_of(name):
            raise Refused(409, f"Reference already exists: {name}")
        repository.refs[f"refs/heads/{name}"] = self.at(key, self.json.get("startingPoint") or "main").sha
        return {}

    @route("POST", REPOSITORY + "/tag/(.+)")
    def create_tag(self, key: str, revision: str) -> object:
        if f"refs/tags/{self.json['tag']}" in self.repository(key, write=True).refs:
            raise Refused(409, "Tag reference exists already")
        self.hub.tag(key, self.json["tag"], self.at(key, revision).sha)
        return {}

    # Reading.

    @route("GET", REPOSITORY + "(?:/revision/([^/]+))?")
    def info(self, key: str, revision: str) -> object:
        commit, repository, name = self.at(key, revision or "main"), self.repository(key), key.split("/", 1)[1]
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": len(file.content), "blobId": file.blob_id, **file.lfs_info("sha256")}
        dates = dict(lastModified=commit.date, createdAt=[*repository.history("main")][-1].date)
        counts = dict(downloads=0, likes=0, gated=False, disabled=False, tags=[], author=name.split("/")[0])
        return dict(_id="0", id=name, sha=commit.sha, private=repository.private, siblings=siblings, **dates, **counts)

    def entries(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """Describe the files and folders of a commit, by path."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in commit.files.items():
            for folder in [path[:i] for i, letter in enumerate(path) if letter == "/"]:
                # Not git's id of the folder, but it changes with the content.
                inside = [f"{p} {f.blob_id}" for p, f in commit.files.items() if p.startswith(f"{folder}/")]
                oid = hashlib.sha1("".join(inside).encode()).hexdigest()
                found.setdefault(folder, {"type": "directory", "path": folder, "size": 0, "oid": oid})
            found[path] = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
            found[path] |= file.lfs_info("oid")
        if "true" in self.query.get("expand", [""])[0].lower():
            last = {"id": commit.sha, "title": commit.title, "date": commit.date}
            found = {path: entry | {"lastCommit": last} for path, entry in found.items()}
        return found

    @route("GET", REPOSITORY + "/tree/([^/]+)/?(.*)")
    def tree(self, key: str, revision: str, under: str) -> object:
        entries = self.entries(commit := self.at(key, revision))
        if under and entries.get(under, {}).get("type") != "directory":
            raise Refused(404, f"{under} does not exist", "EntryNotFound")
        inside = [entry for path, entry in sorted(entries.items()) if not under or path.startswith(f"{under}/")]
        if "true" not in self.query.get("recursive", [""])[0].lower():
            inside = [entry for entry in inside if entry["path"].count("/") == (under.count("/") + 1 if under else 0)]
        status, page, headers = self.page(inside)
        return status, page, {**headers, "X-Repo-Commit": commit.sha}

    @route("POST", REPOSITORY + "/paths-info/([^/]+)")
    def paths_info(self, key: str, revision: str) -> object:
        if "json" in self.headers.get("Content-Type", ""):
            paths, self.query = self.json["paths"], {"expand": [str(self.json.get("expand"))]}
        else:
            self.query = urllib.parse.parse_qs(self.body.decode())
            paths = self.query["paths"]
        entries = self.entries(self.at(key, revision))
        return [entries[path] for path in paths if path in entries]

    @route("GET", REPOSITORY + "/refs")
    def refs(self, key: str) -> object:
        kinds: dict[str, list] = {"heads": [], "tags": [], "pr": [], "convert": []}
        for ref, sha in self.repository(key).refs.items():
            name = ref if ref.startswith("refs/pr/") else ref.split("/", 2)[2]
            kinds[ref.split("/")[1]].append({"name": name, "ref": ref, "targetCommit": sha})
        pulls = {"pullRequests": kinds["pr"]} if "include_prs" in self.query else {}
        return dict(branches=kinds["heads"], tags=kinds["tags"], converts=kinds["convert"], **pulls)

    @route("GET", REPOSITORY + "/commits/([^/]+)")
    def commits(self, key: str, revision: str) -> object:
        history = self.repository(key).history(self.at(key, revision).sha)
        named = [dict(id=c.sha, title=c.title, message=c.description, date=c.date, author=c.author) for c in history]
        return self.page([commit | {"authors": [{"user": commit["author"]}]} for commit in named])

    @route("GET", "/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    def resolve(self, kind: str, name: str, revision: str, path: str) -> object:
        commit = self.at(f"{kind or 'models/'}{name}", revision)
        headers = {"X-Repo-Commit": commit.sha}
        if (file := commit.files.get(path)) is None:
            (refusal := Refused(404, "Entry not found", "EntryNotFound")).headers |= headers
            raise refusal
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        if file.lfs and self.hub.redirect:
            # Another host name is another origin, to which the client must not send its token.
            origin = self.hub.endpoint.replace("127.0.0.1", "localhost")
            location = f"{origin}/cdn/{kind or 'models/'}{name}/{file.sha256}/{urllib.parse.quote(path)}"
            return 302, b"", headers | {"Location": location}
        return self.content(file, headers)

    @route("GET", "/cdn/((?:models|datasets|spaces)/[^/]+/[^/]+)/([0-9a-f]{64})/.+")
    def cdn(self, key: str, oid: str) -> object:
        return self.content(self.hub.repositories[key].objects[oid], {})

    def content(self, file: File, headers: dict[str, str]) -> object:
        start, size = 0, len(file.content)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if not (match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            return 200, file.content, headers
        start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
        end = min(int(match[2]) + 1, size) if match[1] and match[2] else size
        if start >= size:
            return 416, b"", {"Content-Range": f"bytes */{size}"}
        return 206, file.content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}

    # Writing.

    @route("POST", REPOSITORY + "/preupload/([^/]+)")
    def preupload(self, key: str, revision: str) -> object:
        files, answers = self.writable(key, revision).files, []
        for asked in self.json["files"]:
            large = is_large(asked["path"], asked["size"], base64.b64decode(asked.get("sample", "")))
            answer = dict(path=asked["path"], uploadMode="lfs" if large else "regular", shouldIgnore=False)
            there = files.get(asked["path"])
            answers.append(answer | ({"oid": there.etag} if there else {}))
        return {"files": answers}

    @route("POST", r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def batch(self, kind: str, name: str) -> object:
        repository = self.repository(key := f"{kind or 'models/'}{name}")
        if self.user is None or self.user.role != "write":
            raise Refused(403 if self.user else 401, "Forbidden")
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in self.json["objects"]]
        for asked in objects:
            if asked["oid"] not in repository.objects:
                href = f"{self.hub.endpoint}/lfs/{key}/{asked['oid']}"
                asked["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/((?:models|datasets|spaces)/[^/]+/[^/]+)/([0-9a-f]{64})")
    def upload(self, key: str, oid: str) -> object:
        file = File(self.body, lfs=True)
        if file.sha256 != oid:
            raise Refused(400, "The content does not have the announced sha256")
        self.hub.repositories[key].objects[oid] = file
        return 200, b"", {}

    @route("POST", "/lfs/((?:models|datasets|spaces)/[^/]+/[^/]+)/([0-9a-f]{64})/verify")
    def verify(self, key: str, oid: str) -> object:
        file = self.repository(key).objects.get(oid)
        if file is None or len(file.content) != self.json["size"]:
            raise Refused(404, "The content has not arrived")
        return {}

    @route("POST", REPOSITORY + "/commit/([^/]+)")
    def commit(self, key: str, revision: str) -> object:
        repository, head = self.repository(key), self.writable(key, revision)
        add: dict[str, bytes | str | File] = {}
        delete: set[str] = set()
        header: dict[str, str] = {}
        for line in self.body.splitlines():
            (kind, value) = json.loads(line).values()
            if kind == "header":
                header = value
            elif kind == "file":
                add[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif kind == "lfsFile":
                if not (found := repository.objects.get(value["oid"])):
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                add[value["path"]] = found
            elif kind in ("deletedFile", "deletedFolder"):
                folder = value["path"].rstrip("/") + "/" if kind == "deletedFolder" else None
                gone = {p for p in head.files if (p.startswith(folder) if folder else p == value["path"])}
                if not gone:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                delete |= gone
        parent, pull = header.get("parentCommit"), {}
        opens = self.query.get("create_pr") == ["1"]
        if parent and not opens and not head.sha.startswith(parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        author, title, description = self.user.name if self.user else "", header["summary"], header["description"]
        if opens:
            base = next((sha for sha in repository.commits if parent and sha.startswith(parent)), head.sha)
            number = self.hub.open_pull(key, title, description, author, base)["num"]
            revision, pull = f"refs/pr/{number}", {"pullRequestUrl": f"{self.url(key)}/discussions/{number}"}
        sha = self.hub.commit(key, add, delete, revision, title, description, author)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url(key)}/commit/{sha}", **pull}

    @route("POST", REPOSITORY + "/discussions")
    def open_discussion(self, key: str) -> object:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        head = self.at(key, "main").sha
        return self.hub.open_pull(key, self.json["title"], self.json["description"], self.user.name, head)

    @route("GET", REPOSITORY + "/discussions")
    def discussions(self, key: str) -> object:
        status, author = (self.query.get(name, ["all"])[0] for name in ("status", "author"))
        pulls = [pull for pull in self.repository(key).pulls if status in ("all", pull["status"])]
        pulls = [pull for pull in pulls if author in ("all", pull["author"]["name"])]
        return {"count": len(pulls), "start": 0, "discussions": pulls[::-1]}

    @route("GET", REPOSITORY + r"/discussions/(\d+)")
    def discussion(self, key: str, number: str) -> object:
        if found := [pull for pull in self.repository(key).pulls if pull["num"] == int(number)]:
            return found[0]
        raise Refused(404, "Discussion not found")

    # Collections.

    def collection(self, slug: str, write: bool = False) -> dict[str, Any]:
        found, namespace = self.hub.collections.get(slug), slug.split("/")[0]
        if found is None or (found["private"] and not self.owns(namespace)):
            raise Refused(404, "Collection not found")
        if write:
            self.may_write(namespace)
        return found

    def text(self, name: str, most: int) -> str | None:
        if len(text := self.json.get(name) or "") > most:
            raise Refused(400, f"{name} must contain at most {most} characters")
        return text or None

    @route("GET", "/api/collections")
    def list_collections(self) -> object:
        owners = self.query.get("owner", [])
        seen = [c for c in self.hub.collections.values() if not c["private"] or self.owns(c["owner"]["name"])]
        seen = [c for c in seen if not owners or c["owner"]["name"] in owners]
        # Lists have at most four items per collection, without positions, which the client counts.
        return self.page([{k: v for k, v in c.items() if k != "position"} | {"items": c["items"][:4]} for c in seen])

    @route("POST", "/api/collections")
    def create_collection(self) -> object:
        self.may_write(owner := self.json["namespace"])
        title, description = self.text("title", 60) or "", self.text("description", 150)
        for there in self.hub.collections.values():
            if (there["owner"]["name"], there["title"]) == (owner, title):
                raise Refused(409, "This collection already exists", slug=there["slug"])
        words = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
        slug = f"{owner}/{words}-{len(self.hub.collections) + 1:024x}"
        made: dict[str, Any] = dict(slug=slug, title=title, description=description, owner={"name": owner}, items=[])
        made |= dict(private=bool(self.json.get("private")), theme="green", position=0, upvotes=0, lastUpdated=today())
        return self.hub.collections.setdefault(slug, made)

    @route("GET", COLLECTION)
    def get_collection(self, slug: str) -> object:
        return self.collection(slug)

    @route("PATCH", COLLECTION)
    def change_collection(self, slug: str) -> object:
        self.text("title", 60), self.text("description", 150)
        self.collection(slug, write=True).update(self.json, lastUpdated=today())
        return {"success": True, "data": self.collection(slug)}

    @route("POST", COLLECTION + "/items")
    def add_item(self, slug: str) -> object:
        collection, item = self.collection(slug, write=True), self.json["item"]
        if any((there["type"], there["id"]) == (item["type"], item["id"]) for there in collection["items"]):
            raise Refused(409, "This item is in the collection already")
        if item["type"] in ("model", "dataset"):
            self.repository(f"{item['type']}s/{item['id']}")
        taken = [int(there["_id"], 16) for there in collection["items"]]
        made = {"_id": f"{max(taken, default=0) + 1:024x}", **item, "position": len(taken)}
        collection["items"].append(made | {"note": {"text": note}} if (note := self.text("note", 500)) else made)
        return collection

    def item(self, slug: str, number: str) -> dict[str, Any]:
        for item in self.collection(slug, write=True)["items"]:
            if item["_id"] == number:
                return item
        raise Refused(404, "Collection item not found")

    @route("PATCH", COLLECTION + "/items/([0-9a-f]+)")
    def change_item(self, slug: str, number: str) -> object:
        self.item(slug, number)["note"] = {"text": self.text("note", 500)}
        return {}

    @route("DELETE", COLLECTION + "/items/([0-9a-f]+)")
    def delete_item(self, slug: str, number: str) -> object:
        self.collection(slug)["items"].remove(self.item(slug, number))
        return {}


def hasten(monkeypatch: Any) -> None:
    """Disable waits between retries, in the client and the zoo."""
    hasty = SimpleNamespace(**vars(time))
    hasty.sleep = lambda seconds: None
    for module in (
        "huggingface_hub.utils._http",
        "huggingface_hub.file_download",
        "res2net_zoo.utils.hub_client",
        "res2net_zoo.hub.publish",
    ):
        monkeypatch.setattr(f"{module}.time", hasty)


@contextlib.contextmanager
def serve(repositories: Mapping[str, Path | Mapping[str, bytes | str]] | None = None) -> Iterator[Hub]:
    """Serve folders, or mappings, as repositories; yield the hub. Subprocesses need HF_ENDPOINT=hub.endpoint."""
    hub = Hub()
    for key, content in (repositories or {}).items():
        hub.add(key, content)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for connection in list(hub.connections):  # kept alive by clients of this process
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
    assert not hub.errors, hub.errors


if __name__ == "__main__":  # for manual tests: `python -m tests.hub_server`
    with serve() as started, contextlib.suppress(KeyboardInterrupt):
        print(f"export HF_ENDPOINT={started.endpoint} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
