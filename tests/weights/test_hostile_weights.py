"""Weight files that would crash the process or exhaust memory are refused on one line that names the limit.

A separate process converts all of them, each in a fork with limits on memory and time.
"""

import argparse
import io
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from res2net_zoo.training.checkpoints import Checkpoints
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.convert import read_mindspore, read_paddle, read_torch
from res2net_zoo.weights.pretrained import create_model
from res2net_zoo.weights.verification import verify
from tests.conftest import ROOT
from tests.weights.test_convert import mindspore_value, refuse, varint

pytestmark = pytest.mark.first_case

DEPTH = 200_000


def text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def array_of(raw: bytes, count: int) -> bytes:
    """Return opcodes that create an array of the data pushed by the opcodes `raw`."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01J"
        + struct.pack("<i", count)
        + b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89"
        + raw
        + b"tb"
    )


def laughs() -> bytes:
    """Nested tuples, each with the previous one twice: 2**60 elements in total."""
    return b")" + put(0) + (b"0" + get(0) + get(0) + b"\x86" + put(0)) * 60


NESTED = b")" + b"\x85" * DEPTH
INSIDE_OUT = b"".join(b"]" + put(i) for i in range(1000)) + b"".join(get(i) + get(i + 1) + b"a" for i in range(999))
PICKLES = {  # body of a pickle, and part of the expected error
    "a tuple nested deeply as a key": (b"}" + NESTED + b"K\x01s.", "more than 64 deep"),
    "nested tuples as keys among others": (b"}(" + NESTED + b"K\x01" + NESTED + b"K\x02u.", "more than 64 deep"),
    "a tuple nested deeply as a member of a set": (b"\x8f(" + NESTED + b"\x90.", "EMPTY_SET"),
    "a frozen set": (b"(" + NESTED + b"\x91.", "more than 64 deep|FROZENSET"),
    "a set made by a call": (b"cbuiltins\nset\n]" + NESTED + b"a\x85R.", "it would call builtins.set|64 deep"),
    "a tuple nested deeply as a value": (b"}U\x01a" + NESTED + b"s.", "more than 64 deep"),
    "a tuple nested deeply as an argument": (b"ccollections\nOrderedDict\n" + NESTED + b"R.", "more than 64 deep"),
    "a tuple nested deeply as a state": (b"ccollections\nOrderedDict\n)R" + NESTED + b"b.", "more than 64 deep"),
    "a tuple nested deeply as an id": (NESTED + b"Q.", "more than 64 deep"),
    "pairs with nested keys": (b"ccollections\nOrderedDict\n](" + NESTED + b"K\x01lt\x85R.", "64 deep"),
    "lists nested deeply": (b"]" * 30_000 + b"a" * 29_999 + b".", "more than 64 deep"),
    "dicts nested deeply": (b"}" + b"K\x01}" * 30_000 + b"s" * 30_000 + b".", "more than 64 deep"),
    "lists nested from within": (b"(" + INSIDE_OUT + b"t.", "already in use|64 deep"),
    "a list known by two names": (
        b"(]" + put(0) + b"ctorch._utils\n_rebuild_parameter\n" + get(0) + b"\x85R" + get(0) + b"at.",
        "not a tensor|it would call",
    ),
    "a list that holds itself": (b"]" + put(0) + get(0) + b"a.", "already in use"),
    "a dict that holds itself": (b"}" + put(0) + b"U\x01a" + get(0) + b"s.", "already in use"),
    "a billion laughs": (laughs() + b".", "POP"),
    "a billion laughs kept": (b"(" + laughs().replace(b"0", b"") + b"t.", "more bytes than the file has"),
    "keys that are tuples": (b"}K\x01\x85K\x02s.", "key of type tuple"),
    "keys that are large numbers": (b"}\x8a\x08" + b"\xff" * 7 + b"\x00K\x02s.", "key of type int"),
    "a number of megabytes": (b"\x8b" + struct.pack("<I", 10**6) + b"\x01" * 10**6 + b".", "LONG4"),
    "a number of 200 bytes": (b"\x8a\xc8" + b"\x01" * 200 + b".", "number of 200 bytes"),
    "digits of megabytes": (b"I" + b"1" * 10**6 + b"\n.", "INT"),
    "a text used over and over": (text(b"a" * 10**6) + put(0) + b"0(" + get(0) * 9000 + b"t.", "POP"),
    "a text in many places": (b"(" + text(b"a" * 10**6) + put(0) + get(0) * 9000 + b"t.", "more bytes than the file"),
    "an entry twice": (b"}(U\x01aK\x01U\x01aK\x02u.", "its entry a appears twice"),
    "nothing at all": (b".", "damaged"),
    "marks without an end": (b"(" * 900_000 + b".", "more than 64 deep"),
    "a name without an end": (b"c" + b"a" * 10**6, "a name that is too long"),
}


def of_pickle(path: Path, content: bytes) -> None:
    path.write_bytes(b"\x80\x02" + content)


def of_zip(path: Path, content: bytes, **parts: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + content)
        for name, part in {"version": b"3\n", "byteorder": b"little", "data/0": b"\0" * 16, **parts}.items():
            archive.writestr(f"w/{name}", part)


def of_legacy(path: Path, content: bytes) -> None:
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(head + b"\x80\x02" + content + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + b"\0" * 16)


def tensor(size: tuple, stride: tuple, offset: int = 0, numel: int = 4, dtype: str = "Float") -> bytes:
    """Return a pickle of a dict with one tensor, whose storage has four numbers."""
    storage = b"(U\x07storagectorch\n%sStorage\nU\x010U\x03cpu" % dtype.encode() + number(numel) + b"tQ"
    sizes = (b"(" + b"".join(map(number, size)) + b"t" for size in (size, stride))
    built = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + b"".join(sizes)
    return b"}U\x01w" + built + b"\x89ccollections\nOrderedDict\n)RtRs."


def number(n: int) -> bytes:
    return pickle.dumps(n, 2)[2:-1]


SHARED = text(b"a" * 10**6) + put(9) + b"0"
TENSORS = {
    "a storage that would have to grow": (tensor((10**10,), (1,)), "10000000000 numbers in a storage of 4"),
    "one number repeated": (tensor((10**12,), (0,)), "in a storage of 4"),
    "overlapping rows": (tensor((3, 3), (1, 1)), "3x3 numbers in a storage of 4"),
    "an offset beyond the storage": (tensor((1,), (1,), offset=10**9), "in a storage of 4"),
    "a negative size": (tensor((-1,), (1,)), "invalid offset, size or stride"),
    "a negative stride": (tensor((2,), (-1,)), "invalid offset, size or stride"),
    "a size beyond 64 bits": (tensor((2**64,), (1,)), "invalid offset, size or stride"),
    "a size without a stride": (tensor((1, 1), (1,)), "a size and a stride"),
    "a thousand dimensions": (tensor((1,) * 1000, (1,) * 1000), "a size and a stride"),
    "a storage of another size": (tensor((1,), (1,), numel=2), "16 bytes instead of 8|not have its declared size"),
    "a storage of complex numbers": (tensor((1,), (1,), dtype="ComplexFloat"), "torch.ComplexFloatStorage"),
    "a byte array of gigabytes": (b"cbuiltins\nbytearray\n" + number(10**11) + b"\x85R.", "bytearray"),
    "a tensor made of its size": (b"ctorch\nFloatTensor\n" + number(10**11) + b"\x85R.", "torch.FloatTensor"),
    "a sparse tensor": (b"ctorch._utils\n_rebuild_sparse_tensor\n)R.", "_rebuild_sparse_tensor"),
    "a quantized tensor": (b"ctorch._utils\n_rebuild_qtensor\n)R.", "_rebuild_qtensor"),
}


def many_arrays(path: Path, shared: bool = True) -> None:
    """7,000 arrays from one string of 1 MB, the encoding of bytes in protocol 2: 7 GB from 1.1 MB."""
    raw = b"c_codecs\nencode\n" + (get(9) if shared else text(b"a")) + text(b"latin1") + b"\x86R"
    first = b"c_codecs\nencode\n" + text(b"a" * 10**6) + put(9) + text(b"latin1") + b"\x86R"
    entries = [text(b"%d" % i) + array_of(raw if i else first, 10**6) for i in range(7000)]
    of_pickle(path, b"}(" + b"".join(entries) + b"u.")


def arrays_of_one_text(path: Path) -> None:
    """The same without a call: the state of an array may contain a string, which is converted to bytes."""
    entries = [text(b"%d" % i) + array_of(get(9) if i else text(b"a" * 10**6) + put(9), 10**6) for i in range(7000)]
    of_pickle(path, b"}(" + b"".join(entries) + b"u.")


def parts(path: Path, count: int, size: int) -> None:
    """Write a zip file with many entries that share the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.writestr("w/data/0", b"\0" * size)
        first = archive.getinfo("w/data/0")
        for i in range(1, count):
            info = zipfile.ZipInfo(f"w/data/{i}")
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = size
            archive.filelist.append(info)
    path.write_bytes(content.getvalue())


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)


def packed(values: int) -> bytes:
    """Return a MindSpore entry with many dimensions of one byte each."""
    dims = b"\x0a" + varint(values) + b"\x01" * values
    content = dims + b"\x12\x07Float32\x1a\x00"
    entry = b"\x0a\x01w\x12" + varint(len(content)) + content
    return b"\x0a" + varint(len(entry)) + entry


OTHERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "arrays that share a text by calls": ("paddle", many_arrays, "more bytes than the file has"),
    "arrays that share a text": ("paddle", arrays_of_one_text, "more bytes than the file has"),
    "an array of a huge shape": (
        "paddle",
        lambda path: of_pickle(path, b"}" + text(b"w") + array_of(b"U\x01a", 2**31 - 1) + b"s."),
        "with 1 bytes",
    ),
    "a large array of one slice many times": (
        "paddle",
        lambda path: path.write_bytes(
            pickle.dumps(
                {
                    "a": np.zeros(1000, "f"),
                    "UnpackBigParamInfor@@": {"w": {"OriginShape": (5 * 10**8,), "slices": ["a"] * 500_000}},
                },
                2,
            )
        ),
        "the same slice twice",
    ),
    "parts that overlap": ("torch", lambda path: parts(path, 5000, 10**6), "its parts overlap"),
    "many parts": ("torch", lambda path: parts(path, 100_001, 0), "more than the limit of 100,000"),
    "a long list of parts": ("torch", lambda path: parts(path, 400_000, 0), "directory is larger than the limit"),
    "names that differ in case": ("torch", lambda path: of_zip(path, b"}.", **{"DATA.PKL": b"\x80\x02" + b"]."}), ""),
    "a part of another name": (
        "torch",
        lambda path: of_zip(path, tensor((1,), (1,)).replace(b"U\x010", b"U\x019")),
        "missing",
    ),
    "a TorchScript archive": ("torch", lambda path: of_zip(path, b"}.", **{"constants.pkl": b"."}), "TorchScript"),
    "big-endian numbers": ("torch", lambda path: of_zip(path, b"}.", byteorder=b"big"), "not little-endian"),
    "a file of a terabyte of zeros (torch)": ("torch", sparse, "limit of 4,294,967,296"),
    "a file of a terabyte of zeros (paddle)": ("paddle", sparse, "limit of 4,294,967,296"),
    "a file of a terabyte of zeros (mindspore)": ("mindspore", sparse, "limit of 4,294,967,296"),
    "many dimensions": ("mindspore", lambda path: path.write_bytes(packed(10**7)), "10,000,000 dimensions"),
    "a length beyond the file": (
        "mindspore",
        lambda path: path.write_bytes(b"\x0a" + b"\xff" * 9 + b"\x01"),
        "truncated",
    ),
    "a length without an end": ("mindspore", lambda path: path.write_bytes(b"\x0a\xff"), "truncated"),
    "a shape that is not filled": (
        "mindspore",
        lambda path: path.write_bytes(mindspore_value("w", np.broadcast_to(np.float32(0), (10**6, 10**6)), b"1")),
        "has 1 bytes",
    ),
    "many pieces": (
        "mindspore",
        lambda path: path.write_bytes(mindspore_value("w", np.zeros(1, "f"), b"") * 100_001),
        "more entries than the limit of 100,000",
    ),
    "a name that is not UTF-8": (
        "mindspore",
        lambda path: path.write_bytes(mindspore_value("w", np.zeros(1, "f")).replace(b"w", b"\xff")),
        "not UTF-8",
    ),
    "a long name": (
        "mindspore",
        lambda path: path.write_bytes(mindspore_value("w" * 10**6, np.zeros(1, "f"))),
        "www...",
    ),
}

RUNNER = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from res2net_zoo.training.checkpoints import Checkpoints
from res2net_zoo.weights.backbone import find
from res2net_zoo.weights.convert import convert
from res2net_zoo.utils.errors import InputError

def attempt(path, format):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 10**9, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.alarm(30)
    try:
        if format == "checkpoint":
            Checkpoints(Path(path)).load()
        else:
            convert(Path(path), format, {"fc.weight": torch.empty(1, device="meta")})
    except InputError as error:
        return str(error)
    return "it was converted"

def search(path):
    try:
        find(Path(path))
    except InputError as error:
        return str(error)
    return "it was converted"

for path, format in json.loads(sys.stdin.read()):
    read, write = os.pipe()
    if not (child := os.fork()):
        answer = attempt(path, format)
        if format != "checkpoint" and ("\\n" in (other := search(path)) or len(other) > 1500 or "converted" in other):
            answer = f"find: {other}\\n"
        os.write(write, answer.encode()[:2000])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(write)
    print(json.dumps([status, os.read(read, 5000).decode()]), flush=True)
    os.close(read)
"""


def checkpoints(path: Path, write: Callable[[Path, bytes], None], content: bytes) -> None:
    """Write a valid checkpoint and a later one with other content."""
    Checkpoints(path).save(1, {"step": 1})
    write(path / "step-000000002.pt", content)


def all_cases() -> dict[str, tuple[str, Callable[[Path], object], str]]:
    cases = dict(OTHERS)
    for name, (content, words) in {**PICKLES, **TENSORS}.items():
        cases[f"zip: {name}"] = ("torch", lambda path, content=content: of_zip(path, content), words)
        if name not in PICKLES or "nested deeply as" in name:
            cases[f"legacy: {name}"] = ("torch", lambda path, content=content: of_legacy(path, content), words)
        if name in PICKLES and "list" not in name:  # pickles of all formats are read by the same code
            cases[f"paddle: {name}"] = ("paddle", lambda path, content=content: of_pickle(path, content), words)
    for name in ["a tuple nested deeply as a key", "a tuple nested deeply as an argument", "a list that holds itself"]:
        content, words = PICKLES[name]
        for write in (of_zip, of_legacy):
            case = f"checkpoint, {write.__name__}: {name}"
            cases[case] = (
                "checkpoint",
                lambda path, write=write, content=content: checkpoints(path, write, content),
                f"({words}).*; delete it, then resume from step-000000001.pt",
            )
    return cases


CASES = all_cases()


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The exit status and the output line for each selected file."""
    folder = tmp_path_factory.mktemp("hostile")
    files = []
    test = "test_hostile_files_are_refused_within_limits"
    cases = [item.callspec.params["case"] for item in request.session.items if item.originalname == test]
    for i, (format, write, _) in enumerate(map(CASES.__getitem__, cases)):
        write(folder / str(i))
        files.append((str(folder / str(i)), format))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(files), capture_output=True, text=True, env=env, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(cases, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_hostile_files_are_refused_within_limits(case, answers):
    status, line = answers[case]
    assert status == 0 and re.search(CASES[case][2], line), (status, line)
    assert "\n" not in line and len(line) < 1500 and "converted" not in line


@pytest.mark.parametrize("place", ["a FIFO", "/dev/zero", "a folder", "a socket"])
@pytest.mark.parametrize("format", ["torch", "paddle", "mindspore"])
def test_devices_and_pipes_are_not_read(place, format, tmp_path):
    path = tmp_path / "file"
    if place == "a FIFO":
        os.mkfifo(path)
    elif place == "a folder":
        path.mkdir()
    elif place == "a socket":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.relpath(path))  # names of sockets must be short
    else:
        path.symlink_to(place)
    assert "cannot read" in refuse(path, format)
    reader = {"torch": read_torch, "paddle": read_paddle, "mindspore": read_mindspore}[format]
    with pytest.raises(InputError, match="cannot read"):
        reader(path)


def test_part_names_that_are_not_utf_8(tmp_path):
    of_zip(tmp_path / "file", tensor((4,), (1,)))
    content = (tmp_path / "file").read_bytes().replace(b"w/version", b"w/ver\xff\x1b\x00n")
    (tmp_path / "file").write_bytes(content)
    assert read_torch(tmp_path / "file")["w"].tolist() == [0, 0, 0, 0]
    (tmp_path / "file").write_bytes(content.replace(b"w/data.pkl", b"w/d\xff\xff\xff.pkl"))
    assert "not a PyTorch file" in refuse(tmp_path / "file", "torch")


def training_state() -> dict:
    """The content of a checkpoint: tensors with shared storages, optimizer state with integer keys, plain values."""
    model = timm.create_model("res2net_tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    whole = torch.arange(12.0).reshape(3, 4)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [whole, whole[1:], whole.T, whole[:0], torch.tensor(7)],
        "types": [torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.float16, torch.bool, torch.int8)],
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "plain": {"a": [1, -2.5, None, True, "\u00e4", ()], "b": {"c": (2**40, {0: "x"})}, "size": torch.Size([1, 2])},
        "rates": [(i / 7, 1e-3) for i in range(20_000)],
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_are_read_as_by_torch(zipped, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = training_state()
    if zipped:
        checkpoints.save(1, state)
    else:
        torch.save(state, tmp_path / "step-000000001.pt", _use_new_zipfile_serialization=False)
    ours, torchs = checkpoints.load(), torch.load(tmp_path / "step-000000001.pt", weights_only=True)
    assert same(ours, torchs) and same(ours["optimizer"], state["optimizer"])
    ours["views"][0][1, 0] = 99  # as with torch, these share memory
    assert ours["views"][1][0, 0] == 99 and ours["views"][2][0, 1] == 99
    model = timm.create_model("res2net_tiny")
    model.load_state_dict(ours["model"], strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer.load_state_dict(ours["optimizer"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_checkpoints_with_calls_or_huge_tensors_are_refused(tmp_path):
    path = tmp_path / "step-000000001.pt"
    for content, words in TENSORS.values():
        of_zip(path, content)
        with pytest.raises(InputError, match=words):
            Checkpoints(tmp_path).load()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="cannot read"):
        Checkpoints(tmp_path).load()


def test_files_of_python_2(tmp_path):
    one = tensor((2,), (2,), offset=1)[len(b"}U\x01w") : -len(b"s.")]
    of_legacy(tmp_path / "file", b"ccollections\nOrderedDict\n](](U\x01w" + one + b"ee\x85R.")
    assert read_torch(tmp_path / "file")["w"].tolist() == [0, 0]


def test_storage_views_of_torch_before_0_4(tmp_path):
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04(U\x011K\x01K\x03ttQ"
    body = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x01K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    )
    data = struct.pack("<q4f", 4, 1, 2, 3, 4)
    (tmp_path / "file").write_bytes(head + b"\x80\x02}U\x01w" + body + b"s." + pickle.dumps(["0"], 2) + data)
    assert read_torch(tmp_path / "file")["w"].tolist() == [3, 4]
    assert torch.load(tmp_path / "file", weights_only=True)["w"].tolist() == [3, 4]


def pickled_folder(folder: Path, tiny_folder: Path) -> Path:
    """Write a model folder with pickled weights, as in older repositories on the Hub."""
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    state = {"state_dict": load_file(tiny_folder / "model.safetensors"), "args": argparse.Namespace(lr=0.1)}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_pickles_are_checked_before_timm_reads_them(tiny_folder, tmp_path):
    folder = pickled_folder(tmp_path / "folder", tiny_folder)
    name = f"local-dir:{folder}"
    model, expected = (timm.create_model(n, pretrained=True) for n in (name, f"local-dir:{tiny_folder}"))
    assert same(model.state_dict(), expected.state_dict())
    size = (folder / "pytorch_model.bin").stat().st_size
    for case, write in [("a list that holds itself", of_zip), ("a billion laughs kept", of_legacy)]:
        content, words = PICKLES[case]
        write(folder / "pytorch_model.bin", content)
        with (folder / "pytorch_model.bin").open("ab") as file:
            file.write(b"\0" * (size if write is of_legacy else 0))
        with pytest.raises(InputError, match=rf"pytorch_model.bin: .*({words})"):
            timm.create_model(name, pretrained=True)


def test_pickles_of_other_architectures_are_checked(tmp_path):
    folder = tmp_path / "folder"
    model = timm.create_model("resnet10t", num_classes=3)
    timm.models.save_for_hf(model, str(folder), safe_serialization=False)
    assert same(create_model(f"local-dir:{folder}").state_dict(), model.state_dict())
    content, words = PICKLES["a list that holds itself"]
    size = (folder / "pytorch_model.bin").stat().st_size
    of_legacy(folder / "pytorch_model.bin", content)
    with (folder / "pytorch_model.bin").open("ab") as file:
        file.write(b"\0" * size)
    with pytest.raises(InputError, match=rf"pytorch_model.bin: .*({words})"):
        create_model(f"local-dir:{folder}")


SAFETENSORS = {
    "a header of exabytes": struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": struct.pack("<Q", 10**7) + b"{}",
    "a header nested deeply": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "numbers that overlap": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}' + b"\0" * 12,
    "numbers that are missing": b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}',
    "a huge shape without numbers": b'{"a":{"dtype":"F32","shape":[0,9223372036854775807,9223372036854775807],'
    b'"data_offsets":[0,0]}}',
    "a name twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}' + b"\0" * 8,
    "a negative offset": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_hostile_safetensors_files_are_refused(case, tiny_folder, tmp_path):
    content = SAFETENSORS[case]
    if content.startswith(b"{"):
        header = content[: content.rindex(b"}") + 1]
        content = struct.pack("<Q", len(header)) + content
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError) as caught:
        create_model(f"local-dir:{tmp_path}")
    assert len(str(caught.value)) < 1500
    try:
        checks = verify(tmp_path)
    except InputError:
        return
    assert any(check.passed is False for check in checks)
