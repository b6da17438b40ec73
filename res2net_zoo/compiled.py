"""C++ compiled on the machine that runs it, once, by the compiler that it has."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from res2net_zoo.files import temporary_file
from res2net_zoo.hub import assets

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")


class CannotCompile(Exception):
    """This machine cannot compile C++, or cannot load what it compiled."""


def compile_library(source: Path) -> ctypes.CDLL:
    """Return the library made of a source, compiling it if this machine has not yet.

    Args:
        source: The C++ file; it may include `vectors.h` beside it.

    Raises:
        CannotCompile: There is no C++ compiler, or it cannot compile the source.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise CannotCompile("there is no C++ compiler (install g++, or name one in CXX)")

    def run(*args: str) -> bytes:
        done = subprocess.run([compiler, *args], stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise CannotCompile(f"{compiler} cannot compile {source.name}: {lines[0]}")
        return done.stdout

    # What the compiler says of the machine tells apart machines that share a home directory.
    machine = run("-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    texts = (source.read_bytes(), source.with_name("vectors.h").read_bytes())
    name = hashlib.sha256(b"\0".join((*texts, " ".join(FLAGS).encode(), machine))).hexdigest()[:16]
    path = assets("native", name) / f"{source.stem}.so"
    if not path.exists():
        with temporary_file(path) as temporary:
            run(*FLAGS, "-o", str(temporary), str(source))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotCompile(f"cannot load {path}: {error}") from error
