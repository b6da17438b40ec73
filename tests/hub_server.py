"""A Hub on loopback: serves folders as repositories to the real clients, over real HTTP."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` and `datasets` ask for when they read."""

    repositories: dict[str, Path]  # "models/ORG/NAME" or "datasets/ORG/NAME" to its folder
    requests: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.send_file((match[1] or "models/") + match[2], match[3])
        if match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self.send_info(match[1])
        if match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            return self.send_tree(match[1], match[2])
        self.send_json(404, {"error": "Not Found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = self.path.split("?")[0]
        self.requests.append(f"POST {path}")
        if match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/paths-info/[^/]+", path):
            names = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
            folder = self.repositories.get(match[1])
            found = [self.entry(folder, folder / name) for name in names if folder and (folder / name).exists()]
            return self.send_json(200, found)
        self.send_json(404, {"error": "Not Found"})

    @staticmethod
    def entry(folder: Path, path: Path) -> dict:
        kind = "directory" if path.is_dir() else "file"
        content = b"" if path.is_dir() else path.read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        return {"type": kind, "path": str(path.relative_to(folder)), "size": len(content), "oid": oid}

    def send_tree(self, repository: str, under: str) -> None:
        if (folder := self.repositories.get(repository)) is None or not (folder / under).is_dir():
            return self.missing("Entry" if folder else "Repo")
        paths = sorted(
            (folder / under).rglob("*") if "recursive=true" in self.path.lower() else (folder / under).iterdir()
        )
        self.send_json(200, [self.entry(folder, path) for path in paths])

    def send_info(self, repository: str) -> None:
        if (folder := self.repositories.get(repository)) is None:
            return self.missing("Repo")
        siblings = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
        name = repository.split("/", 1)[1]
        info = {
            "_id": "0",
            "id": name,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": siblings,
        }
        self.send_json(200, info)

    def send_file(self, repository: str, name: str) -> None:
        if (folder := self.repositories.get(repository)) is None:
            return self.missing("Repo")
        if not (folder / name).is_file():
            return self.missing("Entry")
        content = (folder / name).read_bytes()
        start, end = 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(end, int(match[2]) + 1) if match[2] else end
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_with(content[start:end])

    def missing(self, what: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", f"{what}NotFound")
        self.end_with(b"{}")

    def send_json(self, status: int, value: object) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_with(json.dumps(value).encode())

    def end_with(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories; yield the endpoint and the list of requests as it grows."""
    requests: list[str] = []
    handler = type("BoundHandler", (Handler,), {"repositories": repositories, "requests": requests})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
