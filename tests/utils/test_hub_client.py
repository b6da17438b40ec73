"""Programs end if a server is silent or slow, redirects in a loop, or asks to wait for a day."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
from huggingface_hub.errors import HTTPError

from res2net_zoo.utils import http, hub_client
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.pretrained import create_model
from tests.conftest import SHIPPED_MODEL, input_error
from tests.hub_server import hasten

pytestmark = pytest.mark.first_case

TIMEOUT = 0.3


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket, bytes], None]) -> Iterator[tuple[str, list[bytes]]]:
    """Run a server that calls `answer` for each connection; yield its URL and the first lines of all requests."""
    asked: list[bytes] = []
    done = threading.Event()

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while head := connection.recv(65536):
                asked.append(head.split(b"\r\n")[0])
                answer(connection, head)
                if done.is_set():
                    break

    def accept() -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        finally:
            done.set()
            thread.join()


def silent(connection: socket.socket, head: bytes) -> None:
    time.sleep(20)


def drip_headers(connection: socket.socket, head: bytes) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" + b"x-header: 1\r\n" * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def drip_body(connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(2000):
        connection.sendall(b" ")
        time.sleep(0.05)


def reply(status: str, headers: str = "", body: bytes = b"{}") -> Callable[[socket.socket, bytes], None]:
    def answer(connection: socket.socket, head: bytes) -> None:
        content = b"" if head.startswith(b"HEAD") else body
        text = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        connection.sendall(text.encode() + content)

    return answer


def huge(connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
    while True:
        connection.sendall(b" " * 2**20)


@pytest.fixture
def point_at(monkeypatch, tmp_path) -> Callable[[str], None]:
    """Sets the Hub's URL in this process, with short time-outs and no waits between retries."""

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
        for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.setattr(constants, name, TIMEOUT)
        monkeypatch.setattr(http, "SILENT_SECONDS", 20)
        hasten(monkeypatch)

    http.install()
    from huggingface_hub.utils import _http, close_session

    close_session()
    factory = _http._GLOBAL_CLIENT_FACTORY
    assert isinstance(factory, http.BoundedFactory)
    factory.state.timeouts.clear()
    yield point
    factory.state.timeouts.clear()


PROGRAMS: dict[str, list[str]] = {
    "verify": ["hub/verify.py", "zoo/tiny"],
    "publish": ["hub/publish.py", str(SHIPPED_MODEL), "--repo-id", "zoo/tiny"],
    "convert": ["hub/convert.py", "--model", "res2net50_26w_4s.in1k", "--checkpoint", "URL/o.pth", "--output", "OUT"],
    "mirror": ["hub/mirror.py", "--model", "res2net50_26w_4s.in1k", "--to", "OUT"],
    "predict": ["scripts/predict.py", "IMAGE", "--model", "hf-hub:zoo/tiny", "--workers", "0"],
}


def run(in_process: Callable, program: str, url: str, tmp_path: Path) -> str:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    places = {"URL": url, "OUT": str(tmp_path / "out"), "IMAGE": str(tmp_path / "image.png")}
    args = []
    for arg in PROGRAMS[program]:
        for word, place in places.items():
            arg = arg.replace(word, place)
        args.append(arg)
    start = time.monotonic()
    line = input_error(in_process(*args))
    assert time.monotonic() - start < 30
    return line


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("answer", [silent, drip_headers, drip_body])
def test_silent_or_slow_server(in_process, point_at, tmp_path, program, answer):
    with listening(answer) as (url, asked):
        point_at(url)
        line = run(in_process, program, url, tmp_path)
        if (answer, program) != (
            drip_body,
            "predict",
        ):  # a HEAD response without the Hub's headers is refused immediately
            assert "0.3 s" in line or "0.6 s" in line or "6 s" in line, line
        assert len(asked) <= 6


def test_publish_dry_run_lists_files_without_a_server(in_process, point_at):
    with listening(silent) as (url, _):
        point_at(url)
        result = in_process("hub/publish.py", SHIPPED_MODEL, "--repo-id", "zoo/tiny", "--dry-run")
    assert result.returncode == 0 and "not compared with zoo/tiny" in result.stderr and "0.3 s" in result.stderr
    assert "| model.safetensors" in result.stdout and "unknown" in result.stdout


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("status", "headers"),
    [
        ("429 Too Many Requests", "Retry-After: 86400\r\n"),
        ("503 Service Unavailable", "Retry-After: 86400\r\n"),
        ("429 Too Many Requests", 'ratelimit: "api";r=0;t=86400\r\n'),
        ("503 Service Unavailable", f"Retry-After: {'9' * 5000}\r\n"),
    ],
    ids=["429", "503", "ratelimit", "digits"],
)
def test_server_that_asks_to_wait_for_a_day(in_process, point_at, tmp_path, monkeypatch, program, status, headers):
    slept: list[float] = []
    with listening(reply(status, headers)) as (url, _):
        point_at(url)
        monkeypatch.setattr(hub_client.time, "sleep", slept.append)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", slept.append)
        line = run(in_process, program, url, tmp_path)
    assert sum(slept) <= http.LONGEST_WAIT
    assert "Retry-After" in line or "9999" in line, line


@pytest.mark.parametrize("location", ["/again", "URL/again"])
def test_server_that_redirects_in_a_loop(in_process, point_at, tmp_path, location):
    holder: list[str] = []

    def answer(connection: socket.socket, head: bytes) -> None:
        reply("302 Found", f"Location: {location.replace('URL', holder[0])}\r\n")(connection, head)

    with listening(answer) as (url, asked):
        holder.append(url)
        point_at(url)
        assert "redirect" in run(in_process, "verify", url, tmp_path)
        with pytest.raises((HTTPError, InputError), match="redirect"):
            create_model("hf-hub:zoo/tiny")
        assert len(asked) < 120


def test_endless_response(in_process, point_at, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "LARGEST_ANSWER", 2**22)
    with listening(huge) as (url, _):
        point_at(url)
        assert "larger than the limit of 4,194,304 bytes" in run(in_process, "verify", url, tmp_path)


@pytest.mark.parametrize("length", ["1000000000000000000", "-5", "abc", "9" * 5000])
def test_invalid_content_length(point_at, tmp_path, length):
    def answer(connection: socket.socket, head: bytes) -> None:
        headers = f'Content-Length: {length}\r\nETag: "abc"\r\nX-Repo-Commit: {"a" * 40}\r\n'
        connection.sendall(f"HTTP/1.1 200 OK\r\n{headers}\r\n".encode() + b"{}" * (not head.startswith(b"HEAD")))
        if not head.startswith(b"HEAD"):
            connection.shutdown(socket.SHUT_RDWR)

    with listening(answer) as (url, _):
        point_at(url)
        start = time.monotonic()
        with pytest.raises(InputError):
            create_model("hf-hub:zoo/tiny")
        assert time.monotonic() - start < 30


def test_slow_but_steady_responses_are_accepted(point_at):
    """Many small responses over one connection, each within the time-out, and a slow but steady one."""

    def answer(connection: socket.socket, head: bytes) -> None:
        time.sleep(0.2)
        reply("200 OK", body=json.dumps({"name": "x"}).encode())(connection, head)

    with listening(answer) as (url, asked):
        point_at(url)
        for _ in range(8):
            assert hub_client.get_session().get(f"{url}/api/whoami-v2").json() == {"name": "x"}
    assert len(asked) == 8


def test_silent_server_is_retried_after_a_while(point_at, monkeypatch):
    answers = [silent, silent, silent, reply("200 OK"), reply("200 OK")]

    def answer(connection: socket.socket, head: bytes) -> None:
        answers.pop(0)(connection, head)

    with listening(answer) as (url, asked):
        point_at(url)
        for _ in range(5):
            with pytest.raises(HTTPError):
                hub_client.get_session().get(f"{url}/api/x", timeout=None)
        assert len(asked) == 3
        monkeypatch.setattr(http, "SILENT_SECONDS", 0)
        assert hub_client.get_session().get(f"{url}/api/x", timeout=None).json() == {}


def test_cached_model_is_used_if_the_hub_is_silent(point_at):
    from tests.hub_server import serve

    with serve() as server:
        server.add("models/zoo/tiny", SHIPPED_MODEL)
        point_at(server.endpoint)
        first = create_model("hf-hub:zoo/tiny")
    with listening(silent) as (url, _):
        point_at(url)
        second = create_model("hf-hub:zoo/tiny")
    assert first.pretrained_cfg["hf_hub_id"] == second.pretrained_cfg["hf_hub_id"] == "zoo/tiny"


@pytest.mark.slow
def test_datasets_time_out(point_at):
    from datasets import load_dataset

    with listening(silent) as (url, _):
        point_at(url)
        start = time.monotonic()
        with pytest.raises(Exception):  # noqa: B017  one of several types
            load_dataset("zoo/digits")
        assert time.monotonic() - start < 60
