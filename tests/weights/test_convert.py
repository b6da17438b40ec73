"""Conversion of files of each framework to timm's state dict, and refusal of hostile files."""

import io
import json
import pickle
import re
import shutil
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.convert import convert, explain, read_mindspore, read_paddle, read_torch
from res2net_zoo.weights.pickles import FormatError
from tests.conftest import relative_error, spread
from tests.weights.originals.draw import images, parameter
from tests.weights.originals.spec import small

ORIGINALS = Path(__file__).parent / "originals"
SMALL = [
    ("paddle_small.pdparams", "paddle"),
    ("paddle_small_protocol2.pdparams", "paddle"),
    ("paddle_small_numpy1.pdparams", "paddle"),
    ("mindspore_small.ckpt", "mindspore"),
    ("mindspore_small_crc.ckpt", "mindspore"),
    ("holocron_small.pth", "holocron"),
    ("mmengine_small.pth", "mmengine"),
]


def small_model(format: str) -> torch.nn.Module:
    return small("paddle" if format == "paddle" else "official", deep=format != "holocron")


@pytest.mark.parametrize(("file", "format"), SMALL)
def test_real_files_of_each_framework(file, format):
    state = convert(ORIGINALS / file, format, small_model(format).state_dict())
    rows = json.loads((ORIGINALS / "small.json").read_text())[format]
    assert len(rows) == sum(1 for key in state if format in ("holocron", "mmengine") or "num_batches" not in key)
    for row in rows:
        expected = torch.from_numpy(parameter(row["name"], row["shape"], row["kind"]))
        if format == "paddle" and row["timm"] == "fc.weight":
            expected = expected.T
        assert torch.equal(state[row["timm"]], expected), row
    assert all(tensor.is_contiguous() for tensor in state.values())


@pytest.mark.parametrize(("file", "format"), SMALL[-2:])
def test_logits_match_the_framework(file, format):
    model = small_model(format)
    model.load_state_dict(convert(ORIGINALS / file, format, model.state_dict()), strict=True)
    logits = json.loads((ORIGINALS / f"logits_{format}.json").read_text())
    for size, expected in logits.items():
        with torch.no_grad():
            ours = model.eval()(torch.from_numpy(images(*map(int, size.split("x")))))
        assert relative_error(ours, torch.tensor(expected)) < 1e-6


def write(path: Path, format: str, tensors: dict[str, np.ndarray]) -> Path:
    """Write a file like a framework; the small real files verify that the format is correct."""
    if format == "paddle":
        path.write_bytes(pickle.dumps({**tensors, "StructuredToParameterName@@": {name: name for name in tensors}}, 4))
    elif format == "mindspore":
        path.write_bytes(b"".join(mindspore_value(name, array) for name, array in tensors.items()))
    else:
        torch.save(OrderedDict((name, torch.from_numpy(array)) for name, array in tensors.items()), path)
    return path


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def mindspore_value(name: str, array: np.ndarray, content: bytes | None = None) -> bytes:
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(data)) + data

    dims = b"".join(b"\x08" + varint(d) for d in array.shape)
    tensor = dims + field(2, b"Float32") + field(3, array.tobytes() if content is None else content)
    return field(1, field(1, name.encode()) + field(2, tensor))


def refuse(path: Path, format: str) -> str:
    with pytest.raises(InputError) as caught:
        convert(path, format, small_model(format).state_dict())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


def changed(format: str, tmp_path: Path, change) -> Path:
    rows = json.loads((ORIGINALS / "small.json").read_text())[format]
    tensors = {row["name"]: parameter(row["name"], row["shape"], row["kind"]) for row in rows}
    change(tensors)
    return write(tmp_path / "file", format, tensors)


@pytest.mark.parametrize("format", ["paddle", "mindspore", "holocron", "mmengine"])
class TestFitIsStrict:
    """All tensors of file and model must match one to one, with equal shapes."""

    def first(self, format: str) -> str:
        return json.loads((ORIGINALS / "small.json").read_text())[format][0]["name"]

    def test_missing(self, format, tmp_path):
        first = self.first(format)
        message = refuse(changed(format, tmp_path, lambda tensors: tensors.pop(first)), format)
        assert "of the model is missing" in message and "conv1" in message and "1 of its tensors" in message

    def test_unexpected_tensor(self, format, tmp_path):
        message = refuse(
            changed(format, tmp_path, lambda t: t.update({"layer9.weight": np.zeros((2, 3), "f")})), format
        )
        assert "layer9.weight (2, 3) is not in the model" in message

    def test_wrong_shape(self, format, tmp_path):
        first = self.first(format)
        message = refuse(
            changed(format, tmp_path, lambda tensors: tensors.update({first: np.zeros((7, 7), "f")})), format
        )
        assert re.search(rf"{re.escape(first)} .*has shape \(7, 7\) in the file and \(\d.*\) in the model", message), (
            message
        )

    def test_many_mismatches_are_listed_on_one_line(self, format, tmp_path):
        message = refuse(
            changed(format, tmp_path, lambda t: t.update({f"x{i}": np.zeros(1, "f") for i in range(30)})), format
        )
        assert "30 of its tensors do not fit" in message and "and 22 more" in message


@pytest.mark.first_case
@pytest.mark.parametrize(("file", "format"), SMALL)
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(file, format, share, tmp_path):
    whole = (ORIGINALS / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(share * len(whole))])
    assert file in refuse(tmp_path / file, format)


def test_missing_file_or_folder(tmp_path):
    assert "No such file" in refuse(tmp_path / "none", "paddle")
    assert "directory" in refuse(tmp_path, "mindspore")


class Dangerous:
    def __reduce__(self):
        return (print, ("this code ran",))


@pytest.mark.first_case
@pytest.mark.parametrize("format", ["paddle", "torch", "mmengine", "holocron"])
@pytest.mark.parametrize("zipped", [False, True])
def test_files_do_not_execute_code(format, zipped, tmp_path, capsys):
    path = tmp_path / "file"
    if format == "paddle":
        path.write_bytes(pickle.dumps({"w": Dangerous()}, 4))
    else:
        torch.save({"w": Dangerous()}, path, _use_new_zipfile_serialization=zipped)
    assert "it would call" in refuse(path, format)
    assert "this code ran" not in capsys.readouterr().out


def test_training_state_in_a_file_is_refused():
    """mmengine's runner also pickles its message hub, which must not be unpickled."""
    assert "HistoryBuffer" in refuse(ORIGINALS / "mmengine_small_trained.pth", "mmengine")


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "numpy.load", "builtins.getattr"])
def test_paddle_files_may_contain_only_arrays(name, tmp_path):
    module, function = name.split(".")
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x04}\x8c\x01w" + f"c{module}\n{function}\n".encode() + b"\x8c\x011\x85Rs.")
    assert name in refuse(path, "paddle")


def test_zip_bomb_is_refused(tmp_path):
    """A zip bomb: 1 GB of zeros in 1 MB."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 2**20)
        archive.writestr("bomb/data/0", b"\0" * 2**20)
    assert "is compressed, which is not supported" in refuse(path, "torch")


class Storage:
    """A storage of many numbers in a forged file."""


class ForgingPickler(pickle._Pickler):
    def __init__(self, file: io.BytesIO, numel: int, legacy: bool) -> None:
        super().__init__(file, 2)
        self.id = ("storage", torch.FloatStorage, "0", "cpu", numel, *([None] if legacy else []))

    def persistent_id(self, value: object) -> tuple | None:
        return self.id if isinstance(value, Storage) else None


class Forged:
    def __init__(self, numel: int) -> None:
        self.numel = numel

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Storage(), 0, (self.numel,), (1,), False, OrderedDict())


def forge(path: Path, numel: int, legacy: bool) -> Path:
    """Write a torch file that declares many numbers but contains four."""
    body = io.BytesIO()
    ForgingPickler(body, numel, legacy).dump(OrderedDict(w=Forged(numel)))
    if legacy:
        machine = dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4))
        head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, machine))
        path.write_bytes(head + body.getvalue() + pickle.dumps(["0"], 2) + struct.pack("<q", numel) + b"\0" * 16)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            parts = {"data.pkl": body.getvalue(), "version": b"3\n", "byteorder": b"little", "data/0": b"\0" * 16}
            for name, content in parts.items():
                archive.writestr(f"w/{name}", content)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_declared_sizes_in_torch_files_allocate_no_memory(legacy, tmp_path, monkeypatch):
    assert read_torch(forge(tmp_path / "whole", 4, legacy))["w"].tolist() == [0, 0, 0, 0]
    path = forge(tmp_path / "huge", 5 * 10**9, legacy)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("memory was taken"))
    with pytest.raises(FormatError, match="declares 20,000,000,000 bytes of weights but has"):
        read_torch(path)


def test_declared_sizes_in_paddle_files_allocate_no_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 5 * 10**9) + b"abc")
    assert "truncated" in refuse(path, "paddle")
    # The shape of the array needs more bytes than there are.
    array = pickle.dumps({"w": np.zeros(3, "f")}, 4).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85", 1)
    path.write_bytes(array)
    refuse(path, "paddle")


def long_steps(path: Path, body: bytes) -> Path:
    path.write_bytes(b"\x80\x02" + body)
    return path


PADDLE_ATTACKS = {
    "an array without numbers": (
        b"cnumpy\nndarray\nJ\x00\x00\x00\x40\x85cnumpy\ndtype\nU\x02f4\x85R\x86R.",
        "without data",
    ),
    "a memo of gigabytes": (b"Nr\x00\x00\x00\x0a.", "not contain a state dict"),
    "bytes of gigabytes": (b"\x96" + struct.pack("<Q", 2**40), "BYTEARRAY8"),
    "an extension": (b"\x82\x01.", "EXT1"),
    "many steps": (b"N" * 1_200_000 + b".", "more than 1,000,000 opcodes"),
    "values that are thrown away": (b"}0" * 10 + b".", "POP"),
}


@pytest.mark.first_case
@pytest.mark.parametrize("attack", PADDLE_ATTACKS)
@pytest.mark.parametrize("format", ["paddle", "torch"])
def test_hostile_pickles_allocate_no_memory(attack, format, tmp_path):
    body, words = PADDLE_ATTACKS[attack]
    tracemalloc.start()
    line = refuse(long_steps(tmp_path / "file", body), format)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6 and (re.search(words, line) or format == "torch"), line


def test_paddle_file_with_repeated_bytes(tmp_path):
    path, array = tmp_path / "file", np.zeros(1000, "f")
    path.write_bytes(pickle.dumps({str(i): array for i in range(9)}, 4))
    assert "not an array of numbers" in refuse(path, "paddle")
    slices = {f"w@@.{i}": array for i in range(9)}
    info = {"UnpackBigParamInfor@@": {"w": {"OriginShape": (9000,), "slices": list(slices)}}}
    path.write_bytes(pickle.dumps({**slices, **info}, 2))
    assert "not an array of numbers" in refuse(path, "paddle")
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000
    body = b"(c_codecs\nencode\nq\x00" + text + b"X\x06\x00\x00\x00latin1\x86q\x01R" + b"h\x00h\x01R" * 20
    path.write_bytes(b"\x80\x02" + body + b"t.")
    assert "more bytes than the file has" in refuse(path, "paddle")


def test_torch_storages_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "file"
    torch.save({"w": torch.zeros(3), "b": bytearray(9)}, path)
    assert "it would call" in refuse(path, "torch")
    other = tmp_path / "other"
    torch.save({"w": torch.zeros(3)}, other)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("second/data.pkl", b"\x80\x02}.")
    assert "not a PyTorch file" in refuse(other, "torch")


def test_file_of_two_formats_is_checked_as_torch_reads_it(tmp_path):
    """A hostile legacy file, followed by a harmless archive."""
    torch.save({"w": torch.zeros(3)}, tmp_path / "harmless")
    torch.save({"b": bytearray(9)}, tmp_path / "file", _use_new_zipfile_serialization=False)
    with (tmp_path / "file").open("ab") as file:
        file.write((tmp_path / "harmless").read_bytes())
    assert zipfile.is_zipfile(tmp_path / "file")
    assert "it would call" in refuse(tmp_path / "file", "torch")


def test_hostile_mindspore_messages(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\x0a\x00" * 200_000)
    assert "more entries than the limit of 100,000" in refuse(path, "mindspore")
    path.write_bytes(b"\x12\x00" + mindspore_value("w", np.zeros(3, "f")))
    assert "fields other than entries" in refuse(path, "mindspore")
    path.write_bytes(mindspore_value("w", np.zeros((1,) * 9, "f")))
    assert "9 dimensions" in refuse(path, "mindspore")


def test_mindspore_slices_are_joined_and_checked(tmp_path):
    path = tmp_path / "file"
    array = np.arange(12, dtype="float32").reshape(3, 4)
    raw = array.tobytes()
    pieces = [mindspore_value("w", array, raw[:20]), mindspore_value("w", array, raw[20:])]
    path.write_bytes(b"".join(pieces))
    assert torch.equal(read_mindspore(path)["w"], torch.from_numpy(array))
    path.write_bytes(pieces[0])
    assert "20 bytes, not those of [3, 4]" in refuse(path, "mindspore")
    path.write_bytes(pieces[0] + mindspore_value("v", array) + pieces[1])
    assert "appears twice" in refuse(path, "mindspore")
    shutil.copy(ORIGINALS / "mindspore_small_crc.ckpt", path)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"Float32", b"Float16", 1))
    assert "checksum" in refuse(path, "mindspore")


def test_paddle_slices_are_joined(tmp_path):
    path = tmp_path / "file"
    array = np.arange(6, dtype="float32")
    parts = {"w@@.0": array[:4], "w@@.1": array[4:]}
    info = {"UnpackBigParamInfor@@": {"w": {"OriginShape": (2, 3), "slices": list(parts)}}}
    path.write_bytes(pickle.dumps({**parts, **info}, 2))
    assert torch.equal(read_paddle(path)["w"], torch.arange(6.0).reshape(2, 3))
    path.write_bytes(pickle.dumps({"w": np.asfortranarray(array.reshape(2, 3))}, 4))
    assert torch.equal(read_paddle(path)["w"], torch.arange(6.0).reshape(2, 3))


def test_conversion_round_trip(tmp_path):
    model = spread(timm.create_model("res2net_tiny"))
    torch.save(model.state_dict(), tmp_path / "file")
    state = convert(tmp_path / "file", "torch", model.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.backbone.encoder."])
@pytest.mark.parametrize("format", ["torch", "mmengine"])
def test_common_prefix_is_removed(prefix, format, tmp_path):
    """Prefixes of `DataParallel`, `torch.compile` or a larger model."""
    model = small_model(format)
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "file")
    converted = convert(tmp_path / "file", format, model.state_dict())
    assert all(torch.equal(converted[name], tensor) for name, tensor in model.state_dict().items())


def test_prefix_is_removed_only_if_all_names_share_it(tmp_path):
    model = small_model("torch")
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({**state, "epoch": torch.ones(1)}, tmp_path / "file")
    line = refuse(tmp_path / "file", "torch")
    assert line.endswith(
        f"none of its {len(state) + 1} tensor names is in the model: its first is module.conv1.0.weight, "
        "the model's is conv1.0.weight"
    )
    torch.save({f"other.{i}": torch.ones(1) for i in range(900)}, tmp_path / "file")
    assert "none of its 900 tensor names" in refuse(tmp_path / "file", "torch")


def test_shortcuts_without_pooling_are_not_taken_for_others(tmp_path):
    """They compute something else where the stride is 2, although the shapes are the same."""
    unpooled = timm.create_model("res2net_tiny", avg_down=False).state_dict()
    torch.save(unpooled, tmp_path / "file")
    with pytest.raises(InputError, match=r"layer2\.0\.downsample"):
        convert(tmp_path / "file", "torch", timm.create_model("res2net_tiny").state_dict())


def test_mismatch_message_has_both_shapes_and_class_counts(tmp_path):
    model = small_model("torch")
    state = model.state_dict()
    classes, channels = state["fc.weight"].shape
    other = {**state, "fc.weight": torch.zeros(7, channels), "fc.bias": torch.zeros(7)}
    torch.save(other, tmp_path / "file")
    line = refuse(tmp_path / "file", "torch")
    assert line.endswith(
        f": the file has 7 classes and the model {classes}; 2 of its tensors do not fit: fc.weight has shape "
        f"(7, {channels}) in the file and ({classes}, {channels}) in the model; fc.bias has shape (7,) in the file "
        f"and ({classes},) in the model"
    )
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(other)
    assert explain(caught.value) == line.split(": ", 1)[1].replace("2 of its tensors do not fit: ", "")


def test_torch_state_dict_errors_are_put_on_one_line():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({"w": torch.ones(1), "weight": torch.ones(3, 1)})
    assert explain(caught.value) == (
        "bias of the model is missing; w is not in the model; "
        "weight has shape (3, 1) in the file and (3, 2) in the model"
    )
    assert explain(RuntimeError("another\n thing")) == "another thing"
