"""Bounds on what the Hub's client waits for: huggingface_hub sends most requests without a time-out.

A server that accepts a connection and stays silent, sends a byte a second, redirects in a circle or asks for a day's
patience ends in an error instead of holding a program up.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpcore2
import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http, parse_ratelimit_headers

SLOWEST = 1000  # bytes a second, on average over two time-outs
LONGEST_WAIT = 300  # seconds for which a server may ask in all before it answers; the Hub's windows have 300
MOST_REDIRECTS = 10
LARGEST_ANSWER = 64 * 2**20  # bytes of JSON or of an error's text
SILENT_TIMEOUTS = 3  # time-outs in a row after which a server is not asked again for a minute
SILENT_SECONDS = 60


class SilentServerError(httpx2.ConnectTimeout):
    """A server has been silent several times in a row and is not asked again for a while."""


def install() -> None:
    """Make huggingface_hub's client keep these bounds, whatever factory makes it; again without effect."""
    factory = _http._GLOBAL_CLIENT_FACTORY
    if not isinstance(factory, BoundedFactory):
        set_client_factory(BoundedFactory(factory))


def read_timeout() -> float:
    """Return for how many seconds a server may be silent: HF_HUB_DOWNLOAD_TIMEOUT or HF_HUB_ETAG_TIMEOUT, or 10."""
    return max(constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)


class BoundedFactory:
    """Makes the client that another factory makes, with bounds.

    Args:
        factory: The other factory.
    """

    def __init__(self, factory: Callable[[], httpx2.Client]) -> None:
        self.factory, self.state = factory, State()

    def __call__(self) -> httpx2.Client:
        """Return a new client."""
        client = self.factory()
        hooks = client.event_hooks
        hooks["request"] = [*hooks["request"], self.state.bound_request]
        hooks["response"] = [self.state.check_response, *hooks["response"]]
        client.event_hooks = hooks
        client.max_redirects = MOST_REDIRECTS
        for transport in [client._transport, *client._mounts.values()]:
            pool: Any = getattr(transport, "_pool", None)
            if isinstance(getattr(pool, "_network_backend", None), httpcore2.NetworkBackend):
                pool._network_backend = WatchedBackend(pool._network_backend, self.state)
        return client


class State:
    """What is known of the servers: which are silent, how often they redirected, for how long they made us wait."""

    def __init__(self) -> None:
        self.timeouts: dict[str, tuple[int, float]] = {}  # by host: how many in a row, and when the last one was
        self.threads = threading.local()

    def bound_request(self, request: httpx2.Request) -> None:
        """Give a request time-outs, and refuse it where the server has just been silent.

        Raises:
            SilentServerError: It has.
        """
        limit = read_timeout()
        if request.method not in ("GET", "HEAD"):
            limit *= 6  # the server has work to do before it answers
        given = request.extensions.get("timeout", {})
        known = {kind: given.get(kind) for kind in ("connect", "read", "write", "pool")}
        timeouts = {kind: limit if seconds is None else min(seconds, limit) for kind, seconds in known.items()}
        timeouts["connect"] = min(timeouts["connect"], read_timeout())
        request.extensions["timeout"] = timeouts
        self.check_silent(request.url.host)

    def check_silent(self, host: str) -> None:
        """Refuse a host that has just been silent.

        Raises:
            SilentServerError: It has.
        """
        number, last = self.timeouts.get(host, (0, 0.0))
        if number >= SILENT_TIMEOUTS and time.monotonic() - last < SILENT_SECONDS:
            raise SilentServerError(f"{host} timed out {number} times in a row, after {read_timeout():g} s each")

    def timed_out(self, host: str) -> None:
        """Count a time-out of a host."""
        self.timeouts[host] = (self.timeouts.get(host, (0, 0.0))[0] + 1, time.monotonic())

    def check_response(self, response: httpx2.Response) -> None:
        """Check what a server answers before it is read or followed.

        Raises:
            TooManyRedirects: It redirects in a circle.
            HfHubHTTPError: It asks to wait for longer than the limit.
        """
        request, now = response.request, self.threads
        if request.method == "HEAD" and response.is_success:
            self.timeouts.pop(request.url.host, None)  # of others, what comes after the headers may be slow
        now.redirects = getattr(now, "redirects", 0) + 1 if response.is_redirect else 0
        if now.redirects > MOST_REDIRECTS:  # the client follows those within a server without counting
            now.redirects = 0
            raise httpx2.TooManyRedirects(f"more than {MOST_REDIRECTS} redirects", request=request)
        seconds = asked_to_wait(response)
        now.waited = getattr(now, "waited", 0) + seconds if response.is_error else 0
        if now.waited > LONGEST_WAIT:
            now.waited = 0
            raise HfHubHTTPError(
                f"the server asks to wait {seconds:,} s (Retry-After), beyond the limit of {LONGEST_WAIT} s in all",
                response=response,
            )
        is_json = "json" in response.headers.get("Content-Type", "")
        if is_json or response.is_error or request.method != "GET" or "/api/" in request.url.path:
            bound_answer(response, lambda: self.timeouts.pop(request.url.host, None))


def asked_to_wait(response: httpx2.Response) -> int:
    """Return for how many seconds a server asks to be left alone; 0 where it does not."""
    if response.status_code not in (408, 429) and response.status_code < 500:
        return 0
    info, after = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "").strip()
    if response.status_code == 429 and info and info.remaining == 0:
        return info.reset_in_seconds
    return int(after[:18]) if after.isdecimal() else 0


def bound_answer(response: httpx2.Response, whole: Callable[[], object]) -> None:
    """Have the reading of a response fail once it is larger than an answer of an API may be.

    Args:
        response: The response, which is not read yet.
        whole: Called once it is.
    """
    read = response.iter_bytes

    def iter_bytes(chunk_size: int | None = None) -> Iterator[bytes]:
        size = 0
        for chunk in read(chunk_size):
            size += len(chunk)
            if size > LARGEST_ANSWER:
                raise HfHubHTTPError(
                    f"the server's answer is larger than the limit of {LARGEST_ANSWER:,} bytes", response=response
                )
            yield chunk
        whole()

    response.iter_bytes = iter_bytes  # type: ignore[method-assign]


class WatchedBackend(httpcore2.NetworkBackend):
    """Opens connections whose speed is watched.

    Args:
        backend: What opens them.
        state: Where time-outs are counted.
    """

    def __init__(self, backend: httpcore2.NetworkBackend, state: State) -> None:
        self.backend, self.state = backend, state

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """Open a connection."""
        try:
            return WatchedStream(self.backend.connect_tcp(host, port, *args, **kwargs), host, self.state)
        except httpcore2.ConnectTimeout:
            self.state.timed_out(host)
            raise

    def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """Open a connection to a socket of this machine."""
        return self.backend.connect_unix_socket(*args, **kwargs)

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self.backend.sleep(seconds)


class WatchedStream(httpcore2.NetworkStream):
    """A connection that counts as silent once it is slower than `SLOWEST` for two time-outs.

    Time-outs alone do not end what comes byte by byte: they count for each byte anew.

    Args:
        stream: The connection.
        host: The server.
        state: Where time-outs are counted.
    """

    def __init__(self, stream: httpcore2.NetworkStream, host: str, state: State) -> None:
        self.stream, self.host, self.state = stream, host, state
        self.waited, self.received = 0.0, 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read what has come.

        Raises:
            ReadTimeout: Nothing has come, or too little over time.
        """
        start = time.monotonic()
        try:
            data = self.stream.read(max_bytes, timeout)
        except httpcore2.ReadTimeout as error:
            self.state.timed_out(self.host)
            raise httpcore2.ReadTimeout(f"no answer from {self.host} within {timeout:g} s") from error
        self.waited += time.monotonic() - start
        self.received += len(data)
        if self.received >= SLOWEST * self.waited:
            self.waited, self.received = 0.0, 0  # of a fast part nothing may be saved for a slow one
        elif self.waited > (limit := 2 * max(timeout or 0.0, read_timeout())):
            self.state.timed_out(self.host)
            raise httpcore2.ReadTimeout(f"{self.host} sent {self.received:,} bytes in {limit:g} s, which is too slow")
        if len(data) > SLOWEST:
            self.state.timeouts.pop(self.host, None)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send, which begins a new answer.

        Raises:
            WriteTimeout: The server does not take it.
        """
        self.waited, self.received = 0.0, 0
        try:
            self.stream.write(buffer, timeout)
        except httpcore2.WriteTimeout as error:
            self.state.timed_out(self.host)
            raise httpcore2.WriteTimeout(f"{self.host} took nothing within {timeout:g} s") from error

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()

    def start_tls(self, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """Return the connection, encrypted."""
        try:
            return WatchedStream(self.stream.start_tls(*args, **kwargs), self.host, self.state)
        except httpcore2.ConnectTimeout:
            self.state.timed_out(self.host)
            raise

    def get_extra_info(self, info: str) -> Any:
        """Return what else is known of the connection."""
        return self.stream.get_extra_info(info)
