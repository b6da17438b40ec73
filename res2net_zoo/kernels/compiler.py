"""Compilation of C++ on the machine that runs it, with a cache.

Libraries are in huggingface_hub's assets cache, each with its SHA-256 in a folder that only the user can write to.
A library that is truncated, was changed, or could have been written by another user is not loaded but compiled again.
If the cache cannot be used, a library is compiled for the current process only.
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
MACROS_TIMEOUT = 15  # seconds to print the compiler's macros, which takes milliseconds
COMPILE_TIMEOUT = 45  # seconds to compile a source, which takes 1 to 4 seconds
LOCK_TIMEOUT = COMPILE_TIMEOUT + 5  # seconds to wait for another process that compiles
LARGEST_OUTPUT = 2**20  # maximum output of a compiler in bytes
LARGEST_LIBRARY = 2**26  # bytes; ours have about 200 kB
LOCK, RECORD = "lock", "sha256"  # files next to a library

Functions = Mapping[str, Sequence[Any]]  # by name: return type and argument types


class CannotCompile(Exception):
    """This machine cannot compile C++, or cannot load the compiled library."""


def compile_library(source: Path, functions: Functions) -> ctypes.CDLL:
    """Return the library of a source, compiled if it is not in the cache.

    Args:
        source: The C++ file; it can include headers from the same folder.
        functions: Signatures of the functions in it.

    Raises:
        CannotCompile: A C++ compiler is missing, fails or takes too long, or the library cannot be loaded.
    """
    try:
        compiler = find_compiler()
        # The compiler's macros distinguish machines that share a home directory.
        output = run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], MACROS_TIMEOUT)
        machine = [line for line in output.splitlines() if line.startswith(b"#define")]
        if not machine:
            raise CannotCompile(f"{shlex.join(compiler)} is not a C++ compiler; set CXX to another one")
        headers = sorted(source.parent.glob("*.h"))
        texts = [path.read_bytes() for path in (source, *headers)]
        facts = b"\0".join((*texts, " ".join(FLAGS).encode(), *machine))
        key = hashlib.sha256(facts).hexdigest()[:16]
        try:
            folder = cached_assets_path("res2net_zoo", "native", "compiled") / key
            return load_or_compile(folder, compiler, source, functions)
        except (OSError, ValueError) as error:
            with tempfile.TemporaryDirectory(prefix="res2net-zoo-") as name:
                library = load_or_compile(Path(name), compiler, source, functions)
            warnings.warn(
                f"{source.name} is compiled for this process only, because the cache cannot be used "
                f"({printable(error)}); set HF_HOME to a folder that only you can write to",
                stacklevel=3,
            )
            return library
    except CannotCompile as error:
        raise CannotCompile(f"cannot compile {source.name}: {printable(error)}") from error
    except (OSError, ValueError, InputError) as error:
        raise CannotCompile(f"cannot compile or load {source.name}: {printable(error)}") from error


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: CXX, which may include arguments, or the first that is installed.

    Raises:
        CannotCompile: No compiler is installed.
        ValueError: CXX cannot be split into words.
    """
    for name, *arguments in filter(None, (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"])):
        path = shutil.which(name)
        if path:
            return [path, *arguments]
    raise CannotCompile("no C++ compiler is installed (install g++, or set CXX)")


def run(command: Sequence[str], seconds: float, **environment: str) -> bytes:
    """Run a compiler with a timeout, and return its output.

    Args:
        command: The program and its arguments.
        seconds: Timeout.
        **environment: Environment variables in addition to those of this process.

    Raises:
        CannotCompile: It cannot be executed, fails, takes too long or prints too much. Its process group is
            killed.
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
            # Kill the whole group, because a driver's compiler survives the driver.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CannotCompile(f"{command[0]} timed out after {seconds} seconds") from error
            raise
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise CannotCompile(f"{command[0]}: {lines[0][:300]}")
    return output


def read_until(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Read the output of a process until a deadline of `time.monotonic`."""
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
                raise CannotCompile(f"the compiler prints more than {LARGEST_OUTPUT:,} bytes")
    raise subprocess.TimeoutExpired(process.args, 0)


def load_or_compile(path: Path, compiler: list[str], source: Path, functions: Functions) -> ctypes.CDLL:
    """Return a library from a folder, compiled there if it is missing or not trusted.

    Raises:
        CannotCompile: The compiler fails, or the library lacks a function.
        OSError: The folder cannot be used, or the library cannot be loaded.
        InputError: The compiler has not written a library.
    """
    folder = open_private(path)
    try:
        name = f"{source.stem}.so"
        with contextlib.suppress(OSError, CannotCompile):
            return load_trusted(folder, path, name, functions)
        with WeakFileLock(path / LOCK, timeout=LOCK_TIMEOUT):
            with contextlib.suppress(OSError, CannotCompile):
                return load_trusted(folder, path, name, functions)  # compiled by another process in the meantime
            empty(folder)
            build(compiler, source, path / name)
            return load_trusted(folder, path, name, functions)
    finally:
        os.close(folder)


def open_private(path: Path) -> int:
    """Open a folder that only its user, or root, can write to, and create it if it is missing.

    Returns:
        Its descriptor, which refers to this folder even if a parent folder is replaced.

    Raises:
        OSError: It is a link, belongs to another user, or cannot be created.
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
    """Whether only this user, or root, can write to a file or a folder."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def open_own(folder: int, name: str) -> BufferedReader:
    """Open a regular file in an open folder for reading, if only this user can write to it.

    Raises:
        OSError: It is missing, not a regular file, or others can write to it.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(name, flags, dir_fd=folder), "rb")
    status = os.fstat(file.fileno())
    if not (stat.S_ISREG(status.st_mode) and is_private(status)):
        file.close()
        raise PermissionError(f"{name} is not a file that only you can write to")
    return file


def load_trusted(folder: int, path: Path, name: str, functions: Functions) -> ctypes.CDLL:
    """Load a library if its SHA-256 matches the recorded one.

    Args:
        folder: Descriptor of its folder.
        path: Path of its folder.
        name: File name.
        functions: Signatures of the functions in it.

    Raises:
        OSError: It is missing, was changed, or cannot be loaded.
        CannotCompile: It lacks a function.
    """
    with open_own(folder, RECORD) as record:
        expected = record.read(64)
    with open_own(folder, name) as file:
        if hashlib.sha256(file.read(LARGEST_LIBRARY)).hexdigest().encode() != expected:
            raise OSError(f"{name} was changed after compilation")
        # Load the file that was checked, even if its path refers to another one by now. The descriptor stays open,
        # because the system identifies loaded libraries by name, and a reused descriptor has the same name.
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
    """Delete the files that killed processes have left in an open folder."""
    for name in os.listdir(folder):
        if name == LOCK:
            continue
        if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def build(compiler: list[str], source: Path, library: Path) -> None:
    """Compile a source, and record the SHA-256 of the library.

    Raises:
        CannotCompile: The compiler fails.
        OSError: The library cannot be written.
        InputError: The compiler has not written it.
    """
    # The compiler's temporary files are in this folder too, so that the next build deletes leftovers.
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        made, record = Path(name, library.name), Path(name, RECORD)
        run([*compiler, *FLAGS, "-o", str(made), str(source)], COMPILE_TIMEOUT, TMPDIR=name)
        content = read_bytes(made, LARGEST_LIBRARY)
        if not is_whole(content):
            raise CannotCompile(f"{compiler[0]} has written a truncated library; is the disk full?")
        record.write_text(hashlib.sha256(content).hexdigest())
        for file in (made, record):  # regardless of the umask
            file.chmod(0o700 if file == made else 0o600)
            file.replace(library.with_name(file.name))


def is_whole(library: bytes) -> bool:
    """Whether an ELF file has all bytes of its segments; loading a truncated one crashes the process."""
    if library[:5] != b"\x7fELF\x02":  # other formats, and 32 bits, are not checked
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
