"""Ends this process if another process of the job is lost because its machine or its network fails.

Collective operations wait for hours, because one process may download and convert data for all, and the launcher of a
machine sees only the processes of that machine. Therefore every process exchanges heartbeats with the first one over a
TCP connection, in a thread. If the first process ends because it has lost another, the remaining ones lose it.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from res2net_zoo.utils.command_line import printable
from res2net_zoo.utils.console import with_options
from res2net_zoo.utils.errors import InputError

INTERVAL = 5.0  # seconds between heartbeats
PATIENCE = 60.0  # seconds without a heartbeat after which a process is lost
# Seconds from the end of another process to that of this one. If all fail for the same reason, they print it meanwhile,
# see `console.report`.
GRACE = 20.0
SILENT_DELAY = 10.0  # additional seconds in which a process of the same machine prints the message
BEAT, BYE = b".", b"-"


class Heartbeat:
    """Heartbeats between this process and the first one; in the first one, with all others.

    Args:
        silent: Whether this process ends without a message, and later than another one of its machine that prints it.
    """

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._connections: list[socket.socket] = []
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._advice = with_options("run it again", "resume")

    def ask(self, connection: socket.socket, name: str) -> None:
        """Send heartbeats to the first process and receive its answers, in a thread.

        Args:
            connection: The connection to it.
            name: Its name in messages.
        """

        def until_it_leaves() -> bool:
            while not self._left.wait(INTERVAL):
                with contextlib.suppress(ConnectionError):  # if the first process left, its BYE was received before
                    connection.sendall(BEAT)
                if (answer := receive(connection)) != BEAT:
                    return answer == BYE
            return True

        self._watch(connection, name, until_it_leaves)

    def answer(self, connection: socket.socket, name: str) -> None:
        """Answer the heartbeats of another process, in a thread. The arguments are those of `ask`."""

        def until_it_leaves() -> bool:
            while (beat := receive(connection)) == BEAT:
                connection.sendall(BEAT)
            return beat == BYE

        self._watch(connection, name, until_it_leaves)

    def _watch(self, connection: socket.socket, name: str, until_it_leaves: Callable[[], bool]) -> None:
        """Run the exchange of heartbeats in a thread, and end this process if it fails."""

        def watch() -> None:
            reason, delay = "has ended; its own output shows why, unless it was killed", GRACE
            try:
                if until_it_leaves():
                    return
            except TimeoutError:
                reason = f"has not answered for {PATIENCE:.0f} seconds: its machine or the network is down"
                delay = 0
            except ConnectionError:
                pass
            except OSError as error:
                reason = f"cannot be reached: {error.strerror or error}"
            if not self._left.wait(delay + SILENT_DELAY * self._silent):
                with self._ending:
                    end_process("" if self._silent else f"{name} {reason}; {self._advice}")

        connection.settimeout(INTERVAL)
        self._connections.append(connection)
        threading.Thread(target=watch, name=f"heartbeat of {name}", daemon=True).start()

    def leave(self) -> None:
        """Stop, when this process and the others no longer need each other."""
        self._left.set()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(BYE)


def receive(connection: socket.socket) -> bytes:
    """Return the next byte, or none at the end of the connection.

    Time in which this process itself is suspended, together with the others, counts as one interval at most.

    Raises:
        TimeoutError: Nothing has arrived for `PATIENCE`.
    """
    for _ in range(round(PATIENCE / INTERVAL)):
        with contextlib.suppress(TimeoutError):
            return connection.recv(1)
    raise TimeoutError


def own_address() -> str:
    """Return the address at which the other machines reach the first process; called in the first process."""
    first = os.environ.get("MASTER_ADDR", "localhost")
    address = address_towards(first)
    # On some systems, the host name is an address of the loopback interface, but only on the machine itself.
    return first if is_loopback(address) else address


def is_loopback(host: str) -> bool:
    """Return whether an address is one of the loopback interface."""
    return host in ("localhost", "::1") or host.startswith("127.")


def address_towards(host: str) -> str:
    """Return the address of the network interface from which this machine reaches a host; nothing is sent."""
    family, *_, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def listen(backlog: int) -> socket.socket:
    """Return a socket on a free port; only on the loopback interface if the first machine is named by it."""
    local = is_loopback(own_address())
    if local or not socket.has_dualstack_ipv6():
        return socket.create_server(("127.0.0.1" if local else "", 0), backlog=backlog)
    return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)


def connect(host: str, port: int, token: str, rank: int) -> socket.socket:
    """Connect to the first process.

    Args:
        host: Its address.
        port: Its port.
        token: The token that it expects.
        rank: Number of this process.

    Raises:
        InputError: It cannot be reached.
    """
    try:
        connection = socket.create_connection((host, port), timeout=30)
        connection.sendall(f"{token} process {rank} ({socket.gethostname()})\n".encode())
    except OSError as error:
        raise InputError(
            f"process {rank} on {socket.gethostname()} cannot connect to process 0 at {host}, port {port}: "
            f"{error.strerror or error}; open all ports between the machines"
        ) from error
    return connection


def accept(server: socket.socket, token: str) -> tuple[socket.socket, str]:
    """Return the next connection that begins with the token, and the name of its process."""
    while True:
        connection, _ = server.accept()
        connection.settimeout(10)
        with contextlib.suppress(OSError), connection.makefile("rb", buffering=0) as file:
            received, _, name = file.readline(1000).decode(errors="replace").strip().partition(" ")
            if secrets.compare_digest(received.encode(), token.encode()):
                return connection, name
        connection.close()


@contextlib.contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End this process with a message if the context takes longer."""
    timer = threading.Timer(seconds, end_process, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_process(message: str) -> None:
    """Print an error as one line, and end this process at once with exit code 1, even if its main thread is blocked.

    Files are written under temporary names and renamed, so that none is left incomplete.

    Args:
        message: The error; nothing is printed if it is empty.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        if message:
            print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    os._exit(1)
