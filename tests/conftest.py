"""Shared fixtures. The tests need no network, and use separate cache folders."""

import os
import sys
import tempfile

# Set before huggingface_hub and datasets are imported, which read them once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="res2net-zoo-test-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two workers of pytest-xdist share the cores

import contextlib
import re
import resource
import runpy
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image

import res2net_zoo  # noqa: F401  registers the models
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from tests.hub_server import TOKEN, Hub, hasten, serve

# Programs that the tests start inherit ignored signals: SIGHUP under nohup, SIGINT in the background of a shell.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_MODEL = ROOT / "hub" / "models" / "res2net_tiny.digits"
SHIPPED_DATA = ROOT / "hub" / "datasets" / "digits"

# One model of each wiring, with few channels and few blocks, one of them within a stage.
FEW = dict(layers=(1, 2, 1, 1), channels=(16, 32, 48, 64))
SMALL = {
    "res2net50_26w_4s": FEW,
    "res2next50": FEW,
    "res2net50_vd_26w_4s": FEW,
    "res2net50_v1d_26w_4s": FEW,
    "dla60_res2net": dict(levels=(1, 1, 1, 1, 1, 1), channels=(16, 32, 32, 64, 64, 64)),
    "blres2net50": dict(layers=(2, 2, 2, 1), channels=(16, 32, 48, 64)),
    "seres2next29_6c_24w_4s": dict(layers=(2, 1, 1), channels=(16, 32, 64)),
}

Program = Callable[..., subprocess.CompletedProcess]


def import_mmengine(name: str = "mmengine") -> Any:
    """Import mmengine or a module of it, one process at a time; skip the tests if it is missing.

    It imports yapf, which writes a cache on its first import after an installation; another process that reads the
    unfinished cache fails.
    """
    with FileLock(Path(tempfile.gettempdir()) / f"res2net-zoo-{os.getuid()}-mmengine.lock"):
        return pytest.importorskip(name)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all cases but the first of a test marked `first_case` as `full`."""
    seen = set()
    for item in items:
        if item.get_closest_marker("first_case") and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker("full")
            seen.add(test)


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


def spread(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Set random weights and statistics so that every part of a model affects its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * torch.rand(tensor.shape, generator=generator))
            elif name.endswith("running_mean") or name.endswith("bias"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif tensor.ndim == 1:
                tensor.copy_(0.6 * (1 + 0.2 * torch.randn(tensor.shape, generator=generator)))
            elif tensor.is_floating_point() and tensor.ndim > 1:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return model


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Make writes fail beyond a file size in bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder, recursively, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of res2net_tiny with 10 classes, random weights and no published accuracy."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = spread(timm.create_model("res2net_tiny", num_classes=10))
    write_model_folder(folder, model, model_card("tiny", "# tiny", None), [str(i) for i in range(10)])
    return folder


def save_images(folder: Path, classes: list[str], per_class: int, seed: int = 0) -> Path:
    """Write class folders of small JPEG images of smoothed noise."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            height, width = rng.integers(40, 120, 2)
            noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            noise.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(folder / name / f"{i}.jpg")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A test Hub for the client in this process, an empty cache, and no waits between retries."""
    with serve() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hasten(monkeypatch)
        yield server


@pytest.fixture
def program() -> Program:
    """Runs a program of the repository in a process: `program("scripts/validate.py", "--check")`."""

    def run(
        path: str, *args: object, processes: int = 0, timeout: int = 300, **env: str
    ) -> subprocess.CompletedProcess:
        command = [sys.executable]
        if processes:
            command += ["-m", "accelerate.commands.launch"]
            command += (
                ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"] if processes > 1 else []
            )
            command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
            env = {"ACCELERATE_USE_CPU": "true", **env}
        return subprocess.run(
            [*command, path, *map(str, args)],
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Program:
    """Runs a program like `program`, but in this process, which is faster.

    Data-loading workers are disabled by default, because forking this large process causes seconds of page faults.
    """
    from accelerate.state import AcceleratorState

    def run(path: str, *args: object) -> subprocess.CompletedProcess:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr("res2net_zoo.utils.processes.default_workers", lambda device: 0)
        monkeypatch.syspath_prepend(Path(path).parent)  # as Python does for scripts
        monkeypatch.setattr(sys, "argv", [path, *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(path, run_name="__main__")
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess([path, *args], stopped.value.code or 0, out, err)

    return run


def input_error(result: subprocess.CompletedProcess) -> str:
    """Check that a program failed with one line on stderr and exit code 2, and return the line."""
    # On a busy machine, progress may be printed before the error.
    lines = [line for line in result.stderr.splitlines() if line.strip() and not re.search(r"\d elapsed\b", line)]
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]
