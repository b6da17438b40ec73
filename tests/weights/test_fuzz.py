"""Random hostile files: each is read or refused on one line, within limits of time and memory.

By hand and in CI: `pytest -m fuzz`. Each failure becomes a separate regression test elsewhere.
"""

import io
import json
import pickletools
import selectors
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import ROOT, SHIPPED_MODEL

pytestmark = pytest.mark.fuzz

SECONDS = 20  # per file, with a margin for busy machines
ORIGINALS = ROOT / "tests" / "weights" / "originals"
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, derandomize=True
)

Reader = Callable[[Path], str]


class Worker:
    """A process that reads files, restarted when it ends."""

    def __init__(self, reader: str) -> None:
        self.reader = reader
        self.process: subprocess.Popen | None = None

    def __call__(self, path: Path) -> str:
        """Return the result for a path; fail if the process dies, hangs or raises an unexpected error."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.weights.fuzz_worker", self.reader],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert self.answer(120) == "ready"
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self.answer(SECONDS)
        assert not answer.startswith("failed"), answer.encode().decode("unicode_escape")
        return answer

    def answer(self, seconds: float) -> str:
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if line := self.process.stdout.readline() if selector.select(seconds) else "":
                return line.rstrip("\n")
        self.process.kill()
        code = self.process.wait()
        self.process = None
        raise AssertionError(f"no answer in {seconds} s, or the process died (exit code {code})")


@pytest.fixture
def worker() -> Iterator[Callable[[str], Worker]]:
    started: list[Worker] = []

    def start(reader: str) -> Worker:
        started.append(Worker(reader))
        return started[-1]

    yield start
    for one in started:
        if one.process is not None:
            one.process.kill()
            one.process.wait()


@st.composite
def damaged(draw: st.DrawFn, content: bytes, most: int = 8) -> bytes:
    """Change, delete, repeat or insert bytes, or overwrite some with a large number."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(1, 64))
        change = draw(st.sampled_from(["flip", "cut", "repeat", "put", "number", "end"]))
        if change == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[place : place + size]
        elif change == "repeat":
            data[place:place] = data[place : place + size] * draw(st.integers(1, 200))
        elif change == "put":
            data[place:place] = draw(st.binary(max_size=64))
        elif change == "number":
            kind = draw(st.sampled_from(["<I", ">I", "<Q", ">Q", "<H"]))
            number = draw(st.sampled_from([0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]))
            packed = struct.pack(kind, number % 2 ** (8 * struct.calcsize(kind)))
            data[place : place + len(packed)] = packed
        elif change == "end":
            del data[place:]
    return bytes(data)


GLOBALS = [
    b"collections\nOrderedDict",
    b"torch._utils\n_rebuild_tensor_v2",
    b"torch\nFloatStorage",
    b"os\nsystem",
    b"numpy.core.multiarray\n_reconstruct",
    b"numpy\nndarray",
    b"numpy\ndtype",
    b"_codecs\nencode",
]
OPCODES = [op for op in pickletools.opcodes if op.name not in ("PROTO", "STOP", "FRAME")]
LINES = [b"1\n", b"'a'\n", b"-1\n", b"1e400\n", b"99999999\n", b"x\n"]


@st.composite
def steps(draw: st.DrawFn) -> bytes:
    """One opcode of a pickle, in some cases repeated many times."""
    op = draw(st.sampled_from(OPCODES))
    step = op.code.encode("latin1")
    if op.name == "GLOBAL":
        step += draw(st.sampled_from(GLOBALS)) + b"\n"
    elif op.arg is not None and op.arg.n > 0:
        step += draw(st.binary(min_size=op.arg.n, max_size=op.arg.n))
    elif op.arg is not None and op.arg.n == pickletools.UP_TO_NEWLINE:
        step += draw(st.sampled_from(LINES))
    elif op.arg is not None:
        width = {pickletools.TAKEN_FROM_ARGUMENT1: "B", pickletools.TAKEN_FROM_ARGUMENT8U: "<Q"}.get(op.arg.n, "<I")
        content = draw(st.binary(max_size=20))
        step += struct.pack(width, draw(st.sampled_from([len(content), 127]))) + content
    return step * draw(st.sampled_from([1, 1, 1, 2, 1000, 100_000]))


@st.composite
def nests(draw: st.DrawFn) -> bytes:
    """Nested containers, which are then hashed, copied or passed to a function."""
    deep = draw(st.sampled_from([b")", b"]", b"}"]))
    wrap = draw(st.sampled_from([b"\x85", b"0]q\x01h\x01a", b"\x85\x94", b"]\x94h\x00a"]))
    deep += wrap * draw(st.sampled_from([10, 1000, 200_000]))
    uses = [b"}%sK\x01s", b"(%s\x91", b"\x8f(%s\x90", b"ccollections\nOrderedDict\n(%stR", b"}K\x01%ss", b"%sQ", b"%sb"]
    return draw(st.sampled_from(uses)).replace(b"%s", deep)


@st.composite
def bombs(draw: st.DrawFn) -> bytes:
    """One long string used many times."""
    size = draw(st.sampled_from([1000, 1_000_000]))
    use = draw(
        st.sampled_from(
            [b"h\x00", b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR", b"(h\x00h\x00t", b"h\x00\x85R"]
        )
    )
    return b"X" + struct.pack("<I", size) + b"a" * size + b"q\x00](" + use * draw(st.sampled_from([10, 5000])) + b"e"


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """A pickle with opcodes in random order, most of which end early, or an attack on the process or its memory."""
    attacks = st.lists(nests() | bombs(), min_size=1, max_size=2)
    parts = draw(attacks | attacks | st.lists(steps() | nests(), min_size=1, max_size=20))
    return bytes([0x80, draw(st.integers(2, 5))]) + b"".join(parts) + b"."


@FUZZ
@given(data=st.data())
def run_weights(data: st.DataObject, reader: Reader, folder: Path) -> None:
    format, names = data.draw(
        st.sampled_from(
            [
                ("paddle", ["paddle_small.pdparams", "paddle_small_protocol2.pdparams"]),
                ("mindspore", ["mindspore_small.ckpt", "mindspore_small_crc.ckpt"]),
                ("mmengine", ["mmengine_small.pth", "mmengine_small_trained.pth"]),
                ("holocron", ["holocron_small.pth"]),
                ("torch", ["holocron_small.pth"]),
            ]
        )
    )
    original = (ORIGINALS / data.draw(st.sampled_from(names))).read_bytes()
    inner = zipfile.is_zipfile(io.BytesIO(original)) and data.draw(st.booleans())
    if format == "mindspore" or (data.draw(st.booleans()) and not inner):
        content = data.draw(damaged(original))
    else:
        content = data.draw(pickles())
    if inner:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(original)) as before, zipfile.ZipFile(out, "w") as after:
            for name in before.namelist():
                kept = before.read(name)
                if name.endswith("data.pkl"):
                    kept = content if data.draw(st.booleans()) else data.draw(damaged(kept))
                after.writestr(name, kept)
        content = out.getvalue()
    path = folder / f"file.{format}"
    path.write_bytes(content)
    reader(path)


def test_weights(worker, tmp_path):
    run_weights(reader=worker("weights"), folder=tmp_path)


HOSTILE = st.recursive(
    st.sampled_from([None, True, False, 0, -1, 1, 3, 10**6, 2**40, 2**70, 1e308, float("nan"), float("inf"), "", "x",
                     "\x1b[31m", "../..", "/dev/zero", "resnet50", "vit_giant_patch14_224", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, content: object, more: st.SearchStrategy = HOSTILE) -> object:
    """Change, remove or add a value in a JSON document."""
    if isinstance(content, dict) and content and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(content)))
        if not draw(st.integers(0, 8)):
            return {name: value for name, value in content.items() if name != key}
        return {**content, key: draw(changed(content[key], more))}
    if isinstance(content, list) and content and draw(st.integers(0, 5)):
        i = draw(st.integers(0, len(content) - 1))
        return [*content[:i], draw(changed(content[i], more)), *content[i + 1 :]]
    if isinstance(content, dict) and draw(st.booleans()):
        keys = ["model_args", "layers", "scale", "base_width", "cardinality", "global_pool", "num_classes", "in_chans",
                "pretrained_cfg", "label_names", "url", "file", "task", "block_args", "channels", "output_stride",
                "dilation_rule", "strides", "dilations", "multi_grid"]  # fmt: skip
        return {**content, draw(st.sampled_from(keys)): draw(more)}
    return draw(more)


@FUZZ
@given(data=st.data())
def run_configs(data: st.DataObject, reader: Reader, folder: Path) -> None:
    config = json.loads((SHIPPED_MODEL / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        config = data.draw(changed(config))
    fingerprint = json.loads((SHIPPED_MODEL / "fingerprint.json").read_text())
    fingerprint = data.draw(changed(fingerprint) | st.just(fingerprint))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "fingerprint.json").write_text(json.dumps(fingerprint))
    reader(folder)


def test_configs(worker, tmp_path):
    shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    (tmp_path / "model" / "bom.cdx.json").unlink()  # it would detect every change
    run_configs(reader=worker("model_folder"), folder=tmp_path / "model")


@FUZZ
@given(data=st.data())
def run_bills(data: st.DataObject, reader: Reader, folder: Path) -> None:
    for name in ("bom.cdx.json", "config.json", "fingerprint.json"):
        content = json.loads((SHIPPED_MODEL / name).read_text())
        content = data.draw(changed(content) | st.just(content))
        (folder / name).write_text(json.dumps(content))
    card = (SHIPPED_MODEL / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    text = yaml.safe_dump(data.draw(changed(metadata) | st.just(metadata)))
    (folder / "README.md").write_text(f"---\n{text}\n---\n")
    reader(folder)


def test_bills_of_materials(worker, tmp_path):
    shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    run_bills(reader=worker("bill"), folder=tmp_path / "model")


@FUZZ
@given(data=st.data())
def run_safetensors(data: st.DataObject, reader: Reader, folder: Path) -> None:
    content = (SHIPPED_MODEL / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        header = data.draw(changed(json.loads(content[8 : 8 + size])))
        text = json.dumps(header).encode()
    else:
        text = data.draw(damaged(content[8 : 8 + size]) | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000]))
    claimed = data.draw(st.sampled_from([len(text)] * 6 + [0, 2**31, 2**63, 2**64 - 1]))
    (folder / "model.safetensors").write_bytes(claimed.to_bytes(8, "little") + text + content[8 + size :])
    reader(folder)


def test_safetensors_headers(worker, tmp_path):
    shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    (tmp_path / "model" / "bom.cdx.json").unlink()
    run_safetensors(reader=worker("model_folder"), folder=tmp_path / "model")


@FUZZ
@given(data=st.data())
def run_annotations(data: st.DataObject, reader: Reader, folder: Path, name: str, content: dict) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        content = data.draw(changed(content))  # type: ignore[assignment]
    text = json.dumps(content)
    if not data.draw(st.integers(0, 9)):
        text = data.draw(damaged(text.encode()).map(lambda data: data.decode("latin1")) | st.just("[" * 100_000))
    (folder / "annotations" / name).write_text(text, "utf-8")
    reader(folder)


@pytest.mark.parametrize("name", ["instances_train.json", "person_keypoints_train.json"])
def test_coco_annotations(worker, tmp_path, name):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "train" / "0.png")
    record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 40, 40], "area": 1600, "iscrowd": 0}
    record |= {"segmentation": [[4, 4, 44, 4, 44, 44]], "keypoints": [9, 9, 2, 20, 9, 2], "num_keypoints": 2}
    rle = {**record, "id": 2, "segmentation": {"counts": [0, 3000, 72], "size": [48, 64]}}
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": 64, "height": 48}],
        "annotations": [record, rle] if name.startswith("instances") else [record],
        "categories": [{"id": 1, "name": "person", "keypoints": ["left_eye", "right_eye"], "skeleton": [[1, 2]]}],
    }
    (tmp_path / "annotations" / name).write_text(json.dumps(content))
    reader = worker("annotations")
    assert reader(tmp_path) == "read"
    run_annotations(reader=reader, folder=tmp_path, name=name, content=content)


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "EPS", "ICO", "TGA", "PCX")


@FUZZ
@given(data=st.data())
def run_images(data: st.DataObject, reader: Reader, folder: Path, images: list[bytes]) -> None:
    content = data.draw(st.sampled_from(images))
    head = data.draw(st.integers(1, 200))
    (folder / "image.jpg").write_bytes(data.draw(damaged(content[:head], 4)) + content[head:])
    reader(folder / "image.jpg")


def test_image_headers(worker, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    images = []
    for format in FORMATS:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format)
        images.append(out.getvalue())
    run_images(reader=worker("image"), folder=tmp_path, images=images)


def test_limits_of_the_worker(worker, tmp_path):
    """The limits of time and memory are effective."""
    torch.save({"a": torch.zeros(3 * 2**28)}, tmp_path / "file.torch")  # 3 GiB
    answer = worker("weights")(tmp_path / "file.torch")
    assert answer.startswith("refused")
