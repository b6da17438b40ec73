"""Time-outs and limits for huggingface_hub's HTTP client, which sends most requests without a time-out.

A server that accepts a connection but does not respond, sends one byte per second, redirects in a loop or asks to wait
for a day causes an error instead of blocking the program.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpcore2
import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from res2net_zoo.utils.private_apis import hub_client_factory, wrap_network

SLOWEST = 1000  # bytes per second, averaged over two time-outs
LONGEST_WAIT = 300  # seconds in total that a server may ask to wait; the Hub's rate limit windows have 300
MOST_REDIRECTS = 10
LARGEST_ANSWER = 64 * 2**20  # bytes of JSON or of an error message
SILENT_TIMEOUTS = 3  # consecutive time-outs after which no requests are sent for `SILENT_SECONDS`
SILENT_SECONDS = 60


class SilentServerError(httpx2.ConnectTimeout):
    """A server has timed out several times in a row; further requests fail immediately for a while."""


def install() -> None:
    """Apply these limits to huggingface_hub's client, independent of its factory. Idempotent."""
    factory = hub_client_factory()
    if not isinstance(factory, BoundedFactory):
        set_client_factory(BoundedFactory(factory))


def read_timeout() -> float:
    """Return the read time-out in seconds: HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_ETAG_TIMEOUT or 10."""
    return max(constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)


class BoundedFactory:
    """Adds limits to the clients of another factory.

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
        wrap_network(client, lambda backend: WatchedBackend(backend, self.state))
        return client


class State:
    """Counters of consecutive time-outs by host, and of redirects and waiting times by thread."""

    def __init__(self) -> None:
        self.timeouts: dict[str, tuple[int, float]] = {}  # by host: number in a row, and time of the last one
        self.threads = threading.local()

    def bound_request(self, request: httpx2.Request) -> None:
        """Set the time-outs of a request.

        Raises:
            SilentServerError: The server has just timed out several times.
        """
        limit = read_timeout()
        if request.method not in ("GET", "HEAD"):
            limit *= 6  # the server processes the data before it responds
        given = request.extensions.get("timeout", {})
        known = {kind: given.get(kind) for kind in ("connect", "read", "write", "pool")}
        timeouts = {kind: limit if seconds is None else min(seconds, limit) for kind, seconds in known.items()}
        timeouts["connect"] = min(timeouts["connect"], read_timeout())
        request.extensions["timeout"] = timeouts
        self.check_silent(request.url.host)

    def check_silent(self, host: str) -> None:
        """Check that a host has not just timed out several times.

        Raises:
            SilentServerError: The host has timed out.
        """
        number, last = self.timeouts.get(host, (0, 0.0))
        if number >= SILENT_TIMEOUTS and time.monotonic() - last < SILENT_SECONDS:
            raise SilentServerError(f"{host} timed out {number} times in a row, after {read_timeout():g} s each")

    def timed_out(self, host: str) -> None:
        """Count a time-out of a host."""
        self.timeouts[host] = (self.timeouts.get(host, (0, 0.0))[0] + 1, time.monotonic())

    def check_response(self, response: httpx2.Response) -> None:
        """Check the headers of a response before its body is read or a redirect is followed.

        Raises:
            TooManyRedirects: The server redirects in a loop.
            HfHubHTTPError: The server asks to wait for longer than the limit.
        """
        request, now = response.request, self.threads
        if request.method == "HEAD" and response.is_success:
            self.timeouts.pop(request.url.host, None)  # other methods have a body, which may still be slow
        now.redirects = getattr(now, "redirects", 0) + 1 if response.is_redirect else 0
        if now.redirects > MOST_REDIRECTS:  # huggingface_hub follows relative redirects without counting them
            now.redirects = 0
            raise httpx2.TooManyRedirects(f"more than {MOST_REDIRECTS} redirects", request=request)
        seconds = asked_to_wait(response)
        now.waited = getattr(now, "waited", 0) + seconds if response.is_error else 0
        if now.waited > LONGEST_WAIT:
            now.waited = 0
            raise HfHubHTTPError(
                f"the server asks to wait {seconds:,} s (Retry-After), beyond the limit of {LONGEST_WAIT} s in total",
                response=response,
            )
        is_json = "json" in response.headers.get("Content-Type", "")
        if is_json or response.is_error or request.method != "GET" or "/api/" in request.url.path:
            bound_answer(response, lambda: self.timeouts.pop(request.url.host, None))


def asked_to_wait(response: httpx2.Response) -> int:
    """Return how many seconds a server asks to wait before a retry; 0 if it does not ask."""
    if response.status_code not in (408, 429) and response.status_code < 500:
        return 0
    info, after = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "").strip()
    if response.status_code == 429 and info and info.remaining == 0:
        return info.reset_in_seconds
    return int(after[:18]) if after.isdecimal() else 0


def bound_answer(response: httpx2.Response, whole: Callable[[], object]) -> None:
    """Limit the size of a response that has not been read yet.

    Args:
        response: The response; reading it raises HfHubHTTPError beyond the limit.
        whole: Called when the response has been read completely.
    """
    read = response.iter_bytes

    def iter_bytes(chunk_size: int | None = None) -> Iterator[bytes]:
        size = 0
        for chunk in read(chunk_size):
            size += len(chunk)
            if size > LARGEST_ANSWER:
                raise HfHubHTTPError(
                    f"the server's response is larger than the limit of {LARGEST_ANSWER:,} bytes", response=response
                )
            yield chunk
        whole()

    response.iter_bytes = iter_bytes  # type: ignore[method-assign]


class WatchedBackend(httpcore2.NetworkBackend):
    """Opens connections with a minimum speed.

    Args:
        backend: The backend that opens connections.
        state: Counts time-outs.
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
        """Open a connection to a Unix socket."""
        return self.backend.connect_unix_socket(*args, **kwargs)

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self.backend.sleep(seconds)


class WatchedStream(httpcore2.NetworkStream):
    """A connection that times out if it is slower than `SLOWEST` for the duration of two time-outs.

    A normal time-out does not detect a slow connection, because every byte restarts it.

    Args:
        stream: The connection.
        host: The server.
        state: Counts time-outs.
    """

    def __init__(self, stream: httpcore2.NetworkStream, host: str, state: State) -> None:
        self.stream, self.host, self.state = stream, host, state
        self.waited, self.received = 0.0, 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read received data.

        Raises:
            ReadTimeout: Nothing was received, or the connection is too slow.
        """
        start = time.monotonic()
        try:
            data = self.stream.read(max_bytes, timeout)
        except httpcore2.ReadTimeout as error:
            self.state.timed_out(self.host)
            raise httpcore2.ReadTimeout(f"no response from {self.host} within {timeout:g} s") from error
        self.waited += time.monotonic() - start
        self.received += len(data)
        if self.received >= SLOWEST * self.waited:
            self.waited, self.received = 0.0, 0  # a fast part does not compensate for a slow one
        elif self.waited > (limit := 2 * max(timeout or 0.0, read_timeout())):
            self.state.timed_out(self.host)
            raise httpcore2.ReadTimeout(f"{self.host} sent {self.received:,} bytes in {limit:g} s, which is too slow")
        if len(data) > SLOWEST:
            self.state.timeouts.pop(self.host, None)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send data, and reset the measured speed.

        Raises:
            WriteTimeout: The server does not accept the data in time.
        """
        self.waited, self.received = 0.0, 0
        try:
            self.stream.write(buffer, timeout)
        except httpcore2.WriteTimeout as error:
            self.state.timed_out(self.host)
            raise httpcore2.WriteTimeout(f"{self.host} accepted no data within {timeout:g} s") from error

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()

    def start_tls(self, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """Return the encrypted connection."""
        try:
            return WatchedStream(self.stream.start_tls(*args, **kwargs), self.host, self.state)
        except httpcore2.ConnectTimeout:
            self.state.timed_out(self.host)
            raise

    def get_extra_info(self, info: str) -> Any:
        """Return further information about the connection."""
        return self.stream.get_extra_info(info)
