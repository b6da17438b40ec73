import os
import signal
import socket
import threading
import time

import pytest

from res2net_zoo.utils import heartbeat
from res2net_zoo.utils.console import run
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.heartbeat import (
    Heartbeat,
    accept,
    address_towards,
    connect,
    is_loopback,
    listen,
    own_address,
    time_limit,
)
from res2net_zoo.utils.processes import choose_interface


@pytest.fixture
def pair(monkeypatch):
    """Two connected sockets, with short intervals between heartbeats."""
    for name, seconds in {"INTERVAL": 0.05, "PATIENCE": 0.5, "GRACE": 0.2}.items():
        monkeypatch.setattr(heartbeat, name, seconds)
    pair = socket.socketpair()
    yield pair
    for connection in pair:
        connection.close()


class Ended(list):
    """Collects the messages with which processes would have ended."""

    def wait(self) -> str:
        deadline = time.monotonic() + 10
        while not self and time.monotonic() < deadline:
            time.sleep(0.01)
        (message,) = self
        return message


@pytest.fixture
def ended(monkeypatch):
    ended = Ended()
    monkeypatch.setattr(heartbeat, "end_process", ended.append)
    return ended


@pytest.mark.parametrize("role", ["ask", "answer"])
def test_silence_ends_the_process(pair, ended, role):
    start = time.monotonic()
    getattr(Heartbeat(), role)(pair[0], "process 1 (node1)")
    message = ended.wait()
    assert message.startswith("process 1 (node1) has not answered for 0 seconds: its machine or the network is down")
    assert 0.4 < time.monotonic() - start < 5


@pytest.mark.parametrize("role", ["ask", "answer"])
def test_end_of_another_process_ends_the_process_after_a_while(pair, ended, role):
    start = time.monotonic()
    getattr(Heartbeat(), role)(pair[0], "process 1 (node1)")
    pair[1].close()
    assert ended.wait().startswith("process 1 (node1) has ended; its own output shows why")
    assert time.monotonic() - start > 0.2


def test_one_process_of_a_machine_prints_the_message(pair, ended, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENT_DELAY", 0.1)
    Heartbeat(silent=True).ask(pair[0], "process 0 (node0)")
    pair[1].close()
    assert ended.wait() == ""


@pytest.mark.parametrize("first_leaves", [False, True])
def test_processes_that_leave_do_not_end_others(pair, ended, first_leaves):
    first, other = Heartbeat(), Heartbeat()
    first.answer(pair[0], "process 1")
    other.ask(pair[1], "process 0")
    time.sleep(1)  # longer than the patience
    (first if first_leaves else other).leave()
    time.sleep(0.2)
    pair[0 if first_leaves else 1].shutdown(socket.SHUT_RDWR)
    time.sleep(0.8)
    assert not ended


def test_a_job_that_is_suspended_as_a_whole_continues(pair):
    children = []
    for role, connection in zip(("answer", "ask"), pair, strict=True):
        if not (child := os.fork()):
            getattr(Heartbeat(), role)(connection, "another process")
            time.sleep(3)
            os._exit(0)
        children.append(child)
    time.sleep(0.5)
    for child in children:
        os.kill(child, signal.SIGSTOP)
    time.sleep(1)  # longer than the patience
    for child in children:
        os.kill(child, signal.SIGCONT)
        time.sleep(0.2)
    for child in reversed(children):
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def test_connections_need_the_token(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with listen(2) as server:
        host, port = server.getsockname()
        assert is_loopback(host) and is_loopback(own_address())
        stranger = connect(host, port, "guess", 1)
        threading.Timer(0.1, connect, (host, port, "token", 2)).start()
        connection, name = accept(server, "token")
        assert name == f"process 2 ({socket.gethostname()})"
        assert stranger.recv(1) == b""
        connection.close()
    with pytest.raises(
        InputError, match=f"process 3 on .* cannot connect to process 0 at {host}, port {port}: .*ports"
    ):
        connect(host, port, "token", 3)


def test_gloo_takes_the_interface_towards_the_first_machine(monkeypatch):
    def chosen(address: str) -> str | None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        monkeypatch.setenv("MASTER_ADDR", address)
        choose_interface()
        return os.environ.get("GLOO_SOCKET_IFNAME")

    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert chosen("127.0.0.1") is None and chosen("unknown.invalid") is None
    monkeypatch.setattr("res2net_zoo.utils.processes.address_towards", lambda host: "10.1.2.3")
    addresses = {"lo": "127.0.0.1", "eth0": "192.168.0.1", "ib0": "10.1.2.3"}
    found = {name: [type("Address", (), {"address": address})] for name, address in addresses.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
    assert chosen("10.9.9.9") == "ib0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_time_limit_ends_a_process_that_is_blocked(capfd):
    if not (child := os.fork()):
        with time_limit(60, "not this"):
            pass
        with time_limit(0.1, "too\nlate"):
            time.sleep(60)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert capfd.readouterr().err == "error: too late\n"


def test_lost_connection_is_reported_on_one_line(monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    place = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561]"
    text = f"{place} Connection closed by peer [10.77.0.1]:44952. This is typically caused by a crash. Check logs."

    def fail() -> int:
        raise RuntimeError(text)

    assert run(fail, {"resume": "--resume"}) == 1
    assert capsys.readouterr().err == (
        "error: another process has ended or cannot be reached (Connection closed by peer [10.77.0.1]:44952); its "
        "output may show why; run it again (--resume)\n"
    )
