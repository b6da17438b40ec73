"""C++ compiled on the machine that runs it, once, by the compiler that it has.

Libraries are kept in huggingface_hub's assets cache, each in a folder that only its user can write to,
with its SHA-256. What another user could have written, or what was cut short or changed since, is not
loaded but compiled again. Where the cache cannot be used, a library is compiled for one process alone.
"""

import contextlib
import ctypes
import hashlib
import os
import selectors
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path
from huggingface_hub.utils import WeakFileLock

from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import read_bytes

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
DESCRIBING = 15  # seconds that a compiler may take to describe the machine, which takes it some milliseconds
COMPILING = 45  # seconds that it may take to compile a source, which takes 1 to 4 seconds
WAITING = COMPILING + 5  # seconds to wait for another process that compiles
LARGEST_OUTPUT = 2**20  # bytes that it may print
LARGEST_LIBRARY = 2**26  # bytes; these have some 200 kB
LOCK, RECORD = "lock", "sha256"  # files beside a library

Functions = Mapping[str, Sequence[Any]]  # a function's name: the type that it returns, and those of its arguments


class CannotCompile(Exception):
    """This machine cannot compile C++, or cannot load what it compiled."""


def compile_library(source: Path, functions: Functions) -> ctypes.CDLL:
    """Return the library made of a source, compiling it if this machine has not yet.

    Args:
        source: The C++ file; it may include `vectors.h` beside it.
        functions: What is called in it.

    Raises:
        CannotCompile: There is no C++ compiler, it cannot compile the source or takes too long, or the
            library cannot be loaded.
    """
    try:
        compiler = find_compiler()
        # What the compiler prints of the machine tells apart machines that share a home directory.
        output = run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], DESCRIBING)
        machine = [line for line in output.splitlines() if line.startswith(b"#define")]
        if not machine:
            raise CannotCompile(f"{shlex.join(compiler)} is not a C++ compiler; name another in CXX")
        texts = (source.read_bytes(), source.with_name("vectors.h").read_bytes())
        facts = b"\0".join((*texts, " ".join(FLAGS).encode(), *machine))
        key = hashlib.sha256(facts).hexdigest()[:16]
        try:
            folder = cached_assets_path("res2net_zoo", "native", "compiled") / key
            return load_or_compile(folder, compiler, source, functions)
        except (OSError, ValueError) as error:
            with tempfile.TemporaryDirectory(prefix="res2net-zoo-") as name:
                library = load_or_compile(Path(name), compiler, source, functions)
            warnings.warn(
                f"{source.name} is compiled for this process alone, since the cache cannot be used "
                f"({printable(error)}); set HF_HOME to a folder of your own",
                stacklevel=3,
            )
            return library
    except CannotCompile as error:
        raise CannotCompile(f"cannot compile {source.name}: {printable(error)}") from error
    except (OSError, ValueError, InputError) as error:
        raise CannotCompile(f"cannot compile or load {source.name}: {printable(error)}") from error


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: CXX, which may have arguments, or the first that is installed.

    Raises:
        CannotCompile: There is none.
        ValueError: CXX cannot be split into words.
    """
    for name, *arguments in filter(None, (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"])):
        path = shutil.which(name)
        if path:
            return [path, *arguments]
    raise CannotCompile("there is no C++ compiler (install g++, or name one in CXX)")


def run(command: Sequence[str], seconds: float, **environment: str) -> bytes:
    """Run a compiler for a bounded time and return what it prints.

    Args:
        command: The program and its arguments.
        seconds: Time that it may take.
        **environment: Variables that it gets besides this process's.

    Raises:
        CannotCompile: It cannot be executed, fails, takes longer or prints more than it may. What it has
            started is ended with it.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
    except OSError as error:
        raise CannotCompile(f"cannot run {command[0]}: {error.strerror or error}") from error
    deadline = time.monotonic() + seconds
    with process:
        try:
            output = read_until(process, deadline)
            process.wait(max(0, deadline - time.monotonic()))
        except BaseException as error:
            # The compiler of a driver that was killed alone would go on.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CannotCompile(f"{command[0]} has not finished after {seconds} seconds and was stopped") from error
            raise
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines() or [f"it ends with {process.returncode}"]
        raise CannotCompile(f"{command[0]}: {lines[0][:300]}")
    return output


def read_until(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Read all that a process prints, until a time of `time.monotonic`."""
    assert process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0, deadline - time.monotonic())):
            chunk = os.read(process.stdout.fileno(), 2**16)
            output += chunk
            if not chunk:
                return output
            if len(output) > LARGEST_OUTPUT:
                raise CannotCompile(f"it prints more than {LARGEST_OUTPUT:,} bytes")
    raise subprocess.TimeoutExpired(process.args, 0)


def load_or_compile(path: Path, compiler: list[str], source: Path, functions: Functions) -> ctypes.CDLL:
    """Return a library from a folder, compiling it there if it is missing or not to be trusted.

    Raises:
        CannotCompile: The compiler fails, or the library lacks a function.
        OSError: The folder cannot be used, or the library cannot be loaded.
        InputError: The compiler has written no library.
    """
    folder = open_private(path)
    try:
        name = f"{source.stem}.so"
        with contextlib.suppress(OSError, CannotCompile):
            return load(folder, path, name, functions)
        with WeakFileLock(path / LOCK, timeout=WAITING):
            with contextlib.suppress(OSError, CannotCompile):
                return load(folder, path, name, functions)  # another process has compiled it meanwhile
            empty(folder)
            build(compiler, source, path / name)
            return load(folder, path, name, functions)
    finally:
        os.close(folder)


def open_private(path: Path) -> int:
    """Open a folder in which only its user, or root, can change anything, making it if it is missing.

    Returns:
        Its descriptor: what is found by that stays in this folder, whatever happens to those above it.

    Raises:
        OSError: It is a link or belongs to another user, or it cannot be made.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(folder)
        if status.st_uid == os.geteuid() and not is_private(status):
            os.fchmod(folder, 0o700)
            status = os.fstat(folder)
        if not is_private(status):
            raise PermissionError(f"{path} belongs to another user, or others can write to it")
    except OSError:
        os.close(folder)
        raise
    return folder


def is_private(status: os.stat_result) -> bool:
    """Whether only this user, or root, can have written a file or a folder."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def open_own(folder: int, name: str) -> BufferedReader:
    """Open a regular file in an open folder, for reading, that only this user can have written.

    Raises:
        OSError: It is missing or something else.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(name, flags, dir_fd=folder), "rb")
    status = os.fstat(file.fileno())
    if not (stat.S_ISREG(status.st_mode) and is_private(status)):
        file.close()
        raise PermissionError(f"{name} is not a file that only you can write to")
    return file


def load(folder: int, path: Path, name: str, functions: Functions) -> ctypes.CDLL:
    """Load a library if it is what was compiled.

    Args:
        folder: Its folder, open.
        path: Where that is.
        name: Its file.
        functions: What is called in it.

    Raises:
        OSError: It is missing or was changed, or it cannot be loaded.
        CannotCompile: It lacks a function.
    """
    with open_own(folder, RECORD) as record:
        expected = record.read(64)
    with open_own(folder, name) as file:
        if hashlib.sha256(file.read(LARGEST_LIBRARY)).hexdigest().encode() != expected:
            raise OSError(f"{name} is not what was compiled")
        # The very file that was read is loaded, not what its path may lead to by now. Its number stays open, since
        # the system takes another library under a known name for the one that it has.
        number = os.dup(file.fileno())
    opened = Path(f"/proc/self/fd/{number}")
    try:
        library = ctypes.CDLL(str(opened if opened.exists() else path / name))
    except OSError as error:
        os.close(number)
        raise OSError(str(error).replace(str(opened), str(path / name))) from error
    for function, (result, *arguments) in functions.items():
        try:
            found = getattr(library, function)
        except AttributeError as error:
            raise CannotCompile(f"{name} lacks the function {function}") from error
        found.restype, found.argtypes = result, arguments
    return library


def empty(folder: int) -> None:
    """Delete what processes that were killed have left in an open folder."""
    for name in os.listdir(folder):
        if name == LOCK:
            continue
        if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def build(compiler: list[str], source: Path, library: Path) -> None:
    """Compile a source, and record the library's SHA-256 beside it.

    Raises:
        CannotCompile: The compiler fails.
        OSError: The library cannot be written.
        InputError: The compiler has not written it.
    """
    # The compiler's own temporary files are in this folder too, so that the next build deletes what is left of them.
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        made, record = Path(name, library.name), Path(name, RECORD)
        run([*compiler, *FLAGS, "-o", str(made), str(source)], COMPILING, TMPDIR=name)
        content = read_bytes(made, LARGEST_LIBRARY)
        if not is_whole(content):
            raise CannotCompile(f"{compiler[0]} has written only a part of it; is the disk full?")
        record.write_text(hashlib.sha256(content).hexdigest())
        for file in (made, record):  # whatever the umask
            file.chmod(0o700 if file == made else 0o600)
            file.replace(library.with_name(file.name))


def is_whole(library: bytes) -> bool:
    """Whether an ELF file has all bytes that its segments are mapped from: a shorter one would end the process."""
    if library[:5] != b"\x7fELF\x02":  # other formats, and 32 bits, are left to the system
        return bool(library)
    order = "<" if library[5] == 1 else ">"
    try:
        (table,) = struct.unpack_from(order + "Q", library, 32)
        size, count = struct.unpack_from(order + "HH", library, 54)
        for i in range(count):
            begin, _, _, length = struct.unpack_from(order + "QQQQ", library, table + i * size + 8)
            if begin + length > len(library):
                return False
    except struct.error:
        return False
    return True
