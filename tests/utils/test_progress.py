"""Progress: a bar on a terminal, plain lines in pipes and log files, without bars of libraries."""

import os
import pty
import re
import subprocess
import sys
import termios
import unicodedata

from accelerate import Accelerator

from res2net_zoo.utils import console
from tests.conftest import ROOT, SHIPPED_MODEL

CODE = """
import sys, time
import datasets
from huggingface_hub.utils import are_progress_bars_disabled
from res2net_zoo.utils import console

console.LINE_INTERVAL = 0.5

def main():
    print(are_progress_bars_disabled(), datasets.are_progress_bars_disabled())
    with console.progress_bar(None, total=16, desc="count", unit="image") as bar:
        for i in range(16):
            time.sleep(0.1)
            bar.update()
            bar.set_postfix(loss=i, refresh=False)
            if i == 8:
                with bar.external_write_mode(sys.stderr):
                    print("an epoch", file=sys.stderr)
    return 0

sys.exit(console.run(main))
"""


def environment() -> dict[str, str]:
    """Return the environment without variables set by programs that ran in this process."""
    return {name: value for name, value in os.environ.items() if not name.endswith("_DISABLE_PROGRESS_BARS")}


def control_characters(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"}


def test_progress_in_a_pipe_is_plain_lines():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment(), capture_output=True, timeout=120)
    text = done.stderr.decode()
    assert done.returncode == 0 and not control_characters(text), text
    assert done.stdout.decode() == "True True\n"
    lines = text.splitlines()
    lines.remove("an epoch")
    assert 2 <= len(lines) <= 3
    assert all(re.fullmatch(r"count: \d+ of 16, 00:0\d elapsed, 00:0\d left, loss=\d+", line) for line in lines), text


def test_progress_on_a_terminal_is_a_bar():
    main, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=end
    )
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and stdout == b"False False\n"
    assert re.search(rb"\rcount: +\d+%\|.+\| \d+/16 \[", shown), shown


def test_programs_write_plain_lines(in_process, monkeypatch):
    """Images are counted once, in integers; bars of libraries are disabled."""
    monkeypatch.setattr(console, "LINE_INTERVAL", 0)
    done = in_process(
        "scripts/validate.py", "--model", f"local-dir:{SHIPPED_MODEL}", "--batch-size", 64, "--workers", 0
    )
    assert done.returncode == 0 and not control_characters(done.stderr)
    counts = [line for line in done.stderr.splitlines() if " elapsed" in line]
    assert counts and all(re.search(r": [\d,]+ of 360, ", line) for line in counts), done.stderr
    assert " 360 of 360, " in counts[-1]


def test_only_the_main_process_shows_progress(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_INTERVAL", 0)
    assert list(console.progress_bar(Accelerator(cpu=True), range(3), desc="a")) == [0, 1, 2]
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"a: {n} of 3" for n in (0, 1, 2, 3)
    ]
    monkeypatch.setenv("RANK", "1")
    assert list(console.progress_bar(None, range(3), desc="a")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
