"""Tests of `res2net_zoo.kernels.compiler` with a broken, hostile or hanging compiler or cache.

All tests call `fused_norm.library`, as `accelerate_training` does.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub.utils._cache_assets as cache_assets
import pytest
import timm
import torch
from filelock import FileLock

from res2net_zoo.kernels import compiler, fused_norm
from res2net_zoo.kernels.training import accelerate_training

pytestmark = pytest.mark.first_case

QUICKLY = tuple(flag for flag in compiler.FLAGS if flag != "-O3")
LOAD = f"from res2net_zoo.kernels import compiler, fused_norm; compiler.FLAGS = {QUICKLY}; print(fused_norm.library())"

PLANTED = """#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) void f(void) { FILE* out = fopen(getenv("PLANTED"), "w"); fclose(out); }
void forward(void) {}
void backward(void) {}
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """A new assets cache; the cache of `fused_norm.library` is cleared before and afterwards."""
    folder = tmp_path / "assets"
    monkeypatch.setattr(cache_assets, "HF_ASSETS_CACHE", str(folder))
    monkeypatch.setattr(compiler, "FLAGS", QUICKLY)
    fused_norm.library.cache_clear()
    yield folder
    fused_norm.library.cache_clear()


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A library that creates the file that PLANTED names when it is loaded."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.c").write_text(PLANTED)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "fused_norm.so", folder / "planted.c"], check=True)
    return folder / "fused_norm.so"


def load_anew() -> ctypes.CDLL | None:
    fused_norm.library.cache_clear()
    return fused_norm.library()


def library_in(cache: Path) -> Path:
    (path,) = cache.rglob("fused_norm.so")
    return path


def fake_compiler(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def cases(names: Iterable[str], *default: str) -> list:
    """Return the names of cases, all but the given ones in the slow tier."""
    return [pytest.param(name, marks=[] if name in default else pytest.mark.slow) for name in names]


def train() -> None:
    model = timm.create_model("res2net_tiny", num_classes=10).train().to(memory_format=torch.channels_last)
    accelerate_training(model)
    images = torch.randn(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


HANGING = {
    "at once": "exec sleep 1000",
    "when it compiles": 'case "$*" in *-dM*) echo "#define A"; exit;; esac; sleep 1000',
    "by what it has started": "sleep 1000 & exit 0",
    "whatever signal it gets": "trap '' TERM INT HUP; while :; do sleep 1; done",
    "without output": "exec >&- 2>&-; sleep 1000",
    "in a new session": "setsid sleep 30 & exit 0",
}


@pytest.mark.parametrize("how", cases(HANGING, "at once", "when it compiles"))
def test_hanging_compiler_is_killed_with_its_children(how, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "MACROS_TIMEOUT", 1, raising=False)
    monkeypatch.setattr(compiler, "COMPILE_TIMEOUT", 1, raising=False)
    script = HANGING[how].replace("sleep", f"{tmp_path}/sleep")
    (tmp_path / "sleep").symlink_to("/bin/sleep")
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f"#!/bin/bash\n{script}\n"))
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=r"plain PyTorch.*compiler timed out after 1 seconds"):
        train()
    assert time.monotonic() - begin < 20
    if how != "in a new session":
        running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in contents(path)]
        assert not running
    with warnings.catch_warnings(action="error"):  # only one warning
        assert fused_norm.library() is None


def contents(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


FAILING = {
    "not a program": ("\x7fELF not a program", "cannot run .*compiler"),
    "an unknown interpreter": ("#!/nowhere/sh\n", "cannot run .*compiler"),
    "no shebang": ("exit 3\n", "cannot run .*compiler"),
    "fails": ("#!/bin/bash\nprintf 'no \\033[31mroom\\n'; exit 1\n", r"compiler: no \\x1b\[31mroom"),
    "does nothing": ("#!/bin/bash\n", "not a C.. compiler"),
    "prints without end": ("#!/bin/bash\nyes\n", "prints more than 1,048,576 bytes"),
    "writes nothing": ('#!/bin/bash\necho "#define A"\n', "cannot read .*fused_norm.so"),
    "writes a part": (
        '#!/bin/bash\nc++ "$@" && [ -f "${@: -2:1}" ] && truncate -s 4096 "${@: -2:1}"; exit 0\n',
        "a truncated library",
    ),
    "lacks a function": (
        '#!/bin/bash\n[[ "$*" = *-dM* ]] && echo "#define A" || c++ -shared -x c++ -o "${@: -2:1}" /dev/null\n',
        "fused_norm.so lacks the function forward",
    ),
    "writes no library": (
        '#!/bin/bash\ncase "$*" in *-dM*) echo "#define A";; *) seq 1000 > "${@: -2:1}";; esac\n',
        "invalid ELF header",
    ),
}


@pytest.mark.parametrize("how", cases(FAILING, "not a program", "writes a part", "lacks a function"))
def test_failing_compiler_falls_back_to_plain_pytorch(how, cache, tmp_path, monkeypatch):
    text, words = FAILING[how]
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, text))
    with pytest.warns(UserWarning, match=f"plain PyTorch.*{words}"):
        train()
    with warnings.catch_warnings(action="error"):
        assert fused_norm.library() is None


def test_compiler_with_arguments(cache, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "CXX", f"{fake_compiler(tmp_path, '#!/bin/sh' + chr(10) + 'echo $1 >> $0.log; shift; c++ $@')} -m64"
    )
    assert fused_norm.library() is not None
    assert set(Path(os.environ["CXX"].split()[0] + ".log").read_text().split()) == {"-m64"}


def test_unwritable_cache_keeps_the_fused_steps(cache, monkeypatch):
    cache.write_text("in the way")
    with pytest.warns(UserWarning, match="compiled for this process only.*set HF_HOME"):
        assert fused_norm.library() is not None
    train()
    assert cache.read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_cache_without_permission(cache):
    cache.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="compiled for this process only"):
        assert fused_norm.library() is not None


@pytest.mark.full
@pytest.mark.parametrize("umask", [0, pytest.param(0o002, marks=pytest.mark.slow)])
def test_files_are_private_regardless_of_the_umask(umask, cache):
    before = os.umask(umask)
    try:
        assert fused_norm.library() is not None
    finally:
        os.umask(before)
    path = library_in(cache)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o022 for file in path.parent.iterdir()}.items() >= {
        ("fused_norm.so", 0),
        ("sha256", 0),
    }


def plant(path: Path, planted: Path) -> None:
    path.unlink()
    path.write_bytes(planted.read_bytes())


def other_user(path: Path) -> None:
    os.chown(path, 65534, 65534)


def with_its_hash(path: Path, planted: Path) -> None:
    plant(path, planted)
    path.with_name("sha256").write_text(compiler.hashlib.sha256(planted.read_bytes()).hexdigest())


PLANTS = {
    "changed": plant,
    "for all to write": lambda path, planted: (with_its_hash(path, planted), path.chmod(0o666)),
    "for its group to write": lambda path, planted: (with_its_hash(path, planted), path.chmod(0o660)),
    "a link": lambda path, planted: (with_its_hash(path, planted), path.unlink(), path.symlink_to(planted)),
    "of another user": lambda path, planted: (with_its_hash(path, planted), other_user(path)),
    "hash of another user": lambda path, planted: (with_its_hash(path, planted), other_user(path.with_name("sha256"))),
    "open folder": lambda path, planted: (plant(path, planted), path.parent.chmod(0o777)),
}


@pytest.mark.full
@pytest.mark.parametrize("how", cases(PLANTS, "changed", "for all to write", "hash of another user"))
def test_untrusted_library_is_compiled_again(how, cache, tmp_path, planted, monkeypatch):
    if "another user" in how and os.geteuid():
        pytest.skip("only root can give files away")
    monkeypatch.setenv("PLANTED", str(tmp_path / "ran"))
    assert fused_norm.library() is not None
    path = library_in(cache)
    path.parent.mkdir(exist_ok=True)
    PLANTS[how](path, planted)
    assert load_anew() is not None
    assert not (tmp_path / "ran").exists()
    assert path.read_bytes() != planted.read_bytes() and not path.is_symlink()
    assert path.stat().st_uid == os.geteuid() and not (path.stat().st_mode | path.parent.stat().st_mode) & 0o022


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
@pytest.mark.parametrize("how", ["of another user", "a link"])
def test_folder_of_another_user_is_not_used(how, cache, tmp_path, planted, monkeypatch):
    monkeypatch.setenv("PLANTED", str(tmp_path / "ran"))
    assert fused_norm.library() is not None
    path = library_in(cache)
    with_its_hash(path, planted)
    if how == "a link":
        path.parent.rename(tmp_path / "elsewhere")
        path.parent.symlink_to(tmp_path / "elsewhere")
    else:
        other_user(path.parent)
    with pytest.warns(UserWarning, match="compiled for this process only"):
        assert load_anew() is not None
    assert not (tmp_path / "ran").exists() and path.read_bytes() == planted.read_bytes()


BROKEN = {
    "truncated": lambda path: os.truncate(path, 4096),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "a").touch()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "without its hash": lambda path: path.with_name("sha256").unlink(),
    "with an empty hash": lambda path: path.with_name("sha256").write_text(""),
}


@pytest.mark.full
@pytest.mark.parametrize("how", cases(BROKEN, "truncated", "empty"))
def test_damaged_library_is_compiled_again(how, cache):
    """In a separate process, because a truncated library can crash it with SIGBUS."""
    assert fused_norm.library() is not None
    path = library_in(cache)
    whole = path.read_bytes()
    BROKEN[how](path)
    env = {**os.environ, "HF_ASSETS_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CDLL" in done.stdout and "Warning" not in done.stderr, done.stderr
    assert path.stat().st_size == len(whole)


@pytest.mark.full
def test_leftovers_of_a_killed_compilation_are_deleted(cache, tmp_path, monkeypatch):
    slow = (
        '#!/bin/sh\nc++ "$@" || exit\ncase "$*" in *-shared*) touch $TMPDIR/cc1.s; echo $$ > $0.pid; sleep 60;; esac\n'
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    name = fake_compiler(tmp_path, slow)
    env = {**os.environ, "HF_ASSETS_CACHE": str(cache), "CXX": name}
    process = subprocess.Popen([sys.executable, "-c", LOAD], env=env)
    while not (pid := Path(name + ".pid")).exists() or not pid.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert [path for path in cache.rglob("*") if path.name in ("fused_norm.so", "cc1.s")]
    begin = time.monotonic()
    assert fused_norm.library() is not None  # the lock was released with its process
    assert time.monotonic() - begin < 20
    os.killpg(int(pid.read_text()), signal.SIGKILL)
    assert {path.name for path in library_in(cache).parent.iterdir()} == {"lock", "fused_norm.so", "sha256"}
    assert not list((tmp_path / "tmp").iterdir())
    assert not list(cache.rglob("cc1.s"))


@pytest.mark.full
def test_concurrent_processes_compile_once(cache, tmp_path, monkeypatch):
    log = '#!/bin/sh\ncase "$*" in *-shared*) echo once >> $0.log; sleep 1;; esac\nexec c++ "$@"\n'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, log))
    found: list = []
    threads = [
        threading.Thread(target=lambda: found.append(compiler.compile_library(fused_norm.SOURCE, fused_norm.FUNCTIONS)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and Path(os.environ["CXX"] + ".log").read_text().split() == ["once"]


@pytest.mark.full
def test_timeout_of_the_lock(cache, monkeypatch):
    assert fused_norm.library() is not None
    path = library_in(cache)
    path.unlink()
    monkeypatch.setattr(compiler, "LOCK_TIMEOUT", 1)
    with FileLock(path.with_name("lock")), pytest.warns(UserWarning) as warned:
        load_anew()
    assert "compiled for this process only" in str(warned[0].message)


@pytest.mark.full
def test_reused_descriptor_loads_the_right_library(cache):
    """The system identifies libraries by name, which contains the number of a descriptor."""
    from res2net_zoo.kernels import cpu_network

    cpu_network.library.cache_clear()
    assert cpu_network.library().lanes() in (8, 16)
    assert fused_norm.library() is not None
    train()
