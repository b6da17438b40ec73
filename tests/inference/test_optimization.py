"""Tests of `res2net_zoo.optimize`: logits, choice of the backend, and errors."""

import copy
import gc
import json
import os
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import res2net_zoo
from res2net_zoo.data.sources import open_source
from res2net_zoo.inference import backends, export, optimization
from res2net_zoo.inference.export import load_images
from res2net_zoo.inference.optimization import Unavailable
from res2net_zoo.kernels import cpu_network
from tests.conftest import SHIPPED_DATA, SHIPPED_MODEL, SMALL, full_disk, relative_error, spread

pytestmark = pytest.mark.first_case

CPU_BACKENDS = ("native", "openvino", "onnxruntime", "eager")


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return timm.create_model(f"local-dir:{SHIPPED_MODEL}", pretrained=True).eval()


@pytest.fixture(scope="module")
def digits(tiny) -> torch.Tensor:
    rows = list(open_source(str(SHIPPED_DATA), "validation").rows)
    return load_images(tiny, rows)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*backend.*")
        yield


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float32_logits_are_the_models(tiny, digits, backend):
    fast = res2net_zoo.optimize(tiny, digits[:2], backend=backend)
    assert (fast.backend, fast.precision) == (backend, "float32")
    for n in (2, 1, 5):  # the example's batch size, and others
        with torch.no_grad():
            assert relative_error(fast(digits[:n]), tiny(digits[:n])) < 1e-4


@pytest.mark.parametrize("backend", ["native", "openvino", "eager"])
def test_bfloat16_agrees_on_the_shipped_data(tiny, digits, backend):
    if backend == "native" and not cpu_network.library().has_bf16():
        pytest.skip("this processor has no bfloat16 instructions")
    fast = res2net_zoo.optimize(tiny, digits[:60], "bfloat16", backend)
    assert fast.backend == backend
    with torch.no_grad():
        expected = tiny(digits).argmax(1)
    found = torch.cat([fast(part).argmax(1) for part in digits.split(60)])
    assert len(digits) == 360 and (found == expected).float().mean() >= 0.995
    assert fast(digits[:1]).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inductor(tiny, digits, precision):
    fast = res2net_zoo.optimize(tiny, digits[:2], precision, "inductor")
    assert fast.backend == "inductor"
    with torch.no_grad():
        assert relative_error(fast(digits[:2]), tiny(digits[:2])) < (1e-4 if precision == "float32" else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "native", "eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_feature_maps(backend, precision, tmp_path):
    model = spread(timm.create_model("res2net_tiny", features_only=True)).eval()
    fast = res2net_zoo.optimize(model, images(2, 3, 64, 64), precision, backend, cache_dir=tmp_path)
    assert backend in ("auto", fast.backend) and fast.precision == precision
    for shape in ((2, 3, 64, 64), (5, 3, 32, 96), (0, 3, 64, 64)):
        with torch.no_grad():
            expected, found = model(images(*shape)), fast(images(*shape))
        assert isinstance(found, list) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == torch.float32
            assert not len(one) or relative_error(one, other) < (1e-4 if precision == "float32" else 0.1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_single_map(backend, tmp_path):
    model = spread(timm.create_model("res2net_tiny", num_classes=0, global_pool="")).eval()
    fast = res2net_zoo.optimize(model, images(2, 3, 64, 64), backend=backend, cache_dir=tmp_path)
    assert (fast.backend, fast.classes) == (backend, None)
    for shape in ((2, 3, 64, 64), (3, 3, 64, 64), (0, 3, 64, 64)):
        with torch.no_grad():
            expected, found = model(images(*shape)), fast(images(*shape))
        assert found.shape == expected.shape and (not len(found) or relative_error(found, expected) < 1e-4)


def test_backends_without_maps_are_replaced_with_a_warning(tmp_path):
    model = spread(timm.create_model("res2net_tiny", features_only=True)).eval()
    with pytest.warns(UserWarning, match=r"openvino cannot run this model here .*a single tensor only"):
        fast = res2net_zoo.optimize(model, images(2, 3, 64, 64), backend="openvino", cache_dir=tmp_path)
    assert fast.backend in ("native", "eager")


def test_backend_with_wrong_maps_is_not_used(tmp_path, monkeypatch):
    model = spread(timm.create_model("res2net_tiny", features_only=True)).eval()
    native = backends.BACKENDS["native"]

    def wrong(*args):
        right = native(*args)
        return lambda images: [right(images)[0], *(1.01 * maps for maps in right(images)[1:])]

    monkeypatch.setitem(backends.BACKENDS, "native", wrong)
    with pytest.warns(UserWarning, match="its maps differ by"):
        fast = res2net_zoo.optimize(model, images(2, 3, 64, 64), backend="native", cache_dir=tmp_path)
    assert fast.backend == "eager"


def test_compiled_weights_are_constant():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    compiled = backends.compile_frozen(model, torch.device("cpu"))
    x = images(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x).clone()
        torch.testing.assert_close(compiled(x), expected)
        model[0].weight.zero_()
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("name", SMALL)
def test_every_wiring(name, tmp_path, monkeypatch):
    """Tests the selected backend; the export of each wiring is tested elsewhere."""
    monkeypatch.setattr(optimization, "find_spec", lambda name: None)
    model = spread(timm.create_model(name, num_classes=7, **SMALL[name]))  # in training mode
    before = copy.deepcopy(model.state_dict())
    fast = res2net_zoo.optimize(model, images(2, 3, 64, 64), cache_dir=tmp_path)
    assert set(fast.milliseconds) == {"native", "eager"}
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert relative_error(fast(images(3, 3, 64, 64)), model.eval()(images(3, 3, 64, 64))) < 1e-4


def test_choice_is_cached(tiny, tmp_path, monkeypatch):
    assert optimization.candidates(torch.device("cpu"), "float32") == list(CPU_BACKENDS)
    monkeypatch.setattr(optimization, "candidates", lambda device, precision: ["native", "eager"])
    x = images(1, 3, 64, 64)
    first = res2net_zoo.optimize(tiny, x, cache_dir=tmp_path)
    assert set(first.milliseconds) == {"native", "eager"}
    assert first.backend == min(first.milliseconds, key=lambda name: first.milliseconds[name])
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text()) == {"backend": first.backend, "milliseconds": first.milliseconds}
    for other in (images(2, 3, 64, 64), images(1, 3, 32, 32)):  # the fastest backend can differ
        assert res2net_zoo.optimize(tiny, other, cache_dir=tmp_path).milliseconds


def choose(tiny, tmp_path, monkeypatch, native: float, eager: float, **options):
    """Optimize a model on a machine where the backends take these times."""
    takes = {"native": native, "eager": eager}
    monkeypatch.setattr(optimization, "candidates", lambda *_: ["native", "eager"])

    def times(calls, example):  # the native backend is not a function of this package
        return [takes["native" if isinstance(call, cpu_network.Network) else "eager"] for call in calls]

    monkeypatch.setattr(optimization, "time_interleaved", times)
    fast = res2net_zoo.optimize(tiny, images(1, 3, 32, 32), cache_dir=tmp_path, **options)
    return fast.backend, fast.milliseconds


def test_cached_choice_is_repeated_if_its_time_changes(tiny, tmp_path, monkeypatch):
    assert choose(tiny, tmp_path, monkeypatch, native=9, eager=3) == ("eager", {"native": 9, "eager": 3})  # busy
    assert choose(tiny, tmp_path, monkeypatch, native=1, eager=2.5) == ("eager", {})  # about the same time
    assert choose(tiny, tmp_path, monkeypatch, native=1, eager=1.9) == ("native", {"native": 1, "eager": 1.9})
    assert choose(tiny, tmp_path, monkeypatch, native=1.4, eager=1.2) == ("native", {})
    assert choose(tiny, tmp_path, monkeypatch, native=1.6, eager=1.2) == ("eager", {"native": 1.6, "eager": 1.2})


def test_cached_choice_is_repeated_on_request(tiny, tmp_path, monkeypatch):
    assert choose(tiny, tmp_path, monkeypatch, native=2, eager=1)[0] == "eager"
    assert choose(tiny, tmp_path, monkeypatch, native=1, eager=1.1) == ("eager", {})
    assert choose(tiny, tmp_path, monkeypatch, native=1, eager=1.1, refresh=True)[0] == "native"
    assert choose(tiny, tmp_path, monkeypatch, native=1, eager=1.1) == ("native", {})


@pytest.mark.parametrize(
    ("name", "value"),
    [("fc.weight", float("nan")), ("fc.weight", float("inf")), ("layer2.0.bns.1.running_mean", float("nan"))],
)
def test_nan_or_infinite_weights(tiny, tmp_path, name, value):
    broken = copy.deepcopy(tiny)
    broken.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"the model's {name} has NaN or infinite values"):
        res2net_zoo.optimize(broken, images(1, 3, 64, 64), cache_dir=tmp_path)


def test_overflowing_model(tiny, tmp_path):
    broken = copy.deepcopy(tiny)
    broken.fc.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="returns NaN or infinite logits for example_input"):
        res2net_zoo.optimize(broken, images(1, 3, 64, 64), cache_dir=tmp_path)


def test_tolerance_of_tf32(monkeypatch):
    expected, found = torch.ones(1, 2), torch.tensor([[1.0, 1.001]])
    with pytest.raises(Unavailable, match=r"differ by 0\.001 of the largest, more than 0\.0001"):
        optimization.check(found, expected, "float32")
    monkeypatch.setattr(optimization, "uses_tf32", lambda device: True)
    optimization.check(found, expected, "float32")


def test_triton_supports_half_precision_only():
    gpu = torch.device("cuda")
    assert "triton" not in optimization.candidates(gpu, "float32")
    assert all(optimization.candidates(gpu, precision)[0] == "triton" for precision in ("bfloat16", "float16"))


def test_no_backend_can_run_the_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "candidates", lambda *_: ["eager"])
    monkeypatch.setitem(optimization.BACKENDS, "eager", lambda model, *_: lambda x: 2 * model(x))
    with pytest.raises(ValueError, match="no backend can run this model here in float32: eager: its logits differ by"):
        res2net_zoo.optimize(tiny, images(1, 3, 32, 32), cache_dir=tmp_path)


@pytest.mark.parametrize("how", ["a file in the way", "a full disk", "a folder in the way"])
def test_unwritable_cache(tiny, tmp_path, monkeypatch, how):
    monkeypatch.setattr(optimization, "candidates", lambda *_: ["native", "eager"])
    x, cache = images(1, 3, 32, 32), tmp_path / "cache"
    expected = res2net_zoo.optimize(tiny, x, cache_dir=tmp_path / "other")(x)
    if how == "a file in the way":
        cache.touch()
    elif how == "a folder in the way":
        (file,) = (tmp_path / "other").rglob("*.json")
        (cache / file.relative_to(tmp_path / "other")).mkdir(parents=True)
    with (
        pytest.warns(UserWarning, match="choice of a backend cannot be cached"),
        full_disk(8 if how == "a full disk" else 2**30),
    ):
        fast = res2net_zoo.optimize(tiny, x, cache_dir=cache)
    assert relative_error(fast(x), expected) < 1e-4 and set(fast.milliseconds) == {"native", "eager"}


def test_cached_choice_that_is_a_pipe_or_nested_json(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "candidates", lambda *_: ["eager"])
    res2net_zoo.optimize(tiny, images(1, 3, 32, 32), cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.json")
    file.unlink()
    os.mkfifo(file)
    assert res2net_zoo.optimize(tiny, images(1, 3, 32, 32), cache_dir=tmp_path).milliseconds
    for text in ("[" * 200_000, '{"backend": ' * 200_000, '{"backend": ["eager"]}', '{"backend": {}}'):
        file.write_text(text)
        assert res2net_zoo.optimize(tiny, images(1, 3, 32, 32), cache_dir=tmp_path).milliseconds
        assert json.loads(file.read_text())["backend"] == "eager"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_unusual_inputs(tiny, tmp_path, backend):
    """No images; one image with NaN; a new batch size from two threads at once."""
    x = images(3, 3, 64, 64)
    fast = res2net_zoo.optimize(tiny, x, backend=backend, cache_dir=tmp_path)
    assert fast.backend == backend
    assert fast(x[:0]).shape == (0, 10) and fast(x[:0]).dtype == torch.float32
    for bad in (x[0], x[:, 0]):
        with pytest.raises(ValueError, match=r"not \(N, C, H, W\)"):
            fast(bad)
    with torch.no_grad():
        expected = tiny(x)
    for value in (float("nan"), float("inf"), float("-inf")):
        strange = x.clone()
        strange[1, 0, 30, 31] = value
        found = fast(strange)
        assert found[1].isnan().all() and relative_error(found[[0, 2]], expected[[0, 2]]) < 1e-4

    results: list = []

    def classify() -> None:
        results.extend(fast(x[:n]) - expected[:n] for n in (2, 1, 2, 1, 3) * 5)

    threads = [threading.Thread(target=classify) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 50 and max(result.abs().max() for result in results) < 1e-3 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_few_networks_are_cached(tiny, tmp_path, monkeypatch, backend):
    """One for the example, and one with a dynamic batch size for each of the last few other sizes."""
    alive = weakref.WeakSet()
    to_onnx = export.to_onnx

    def run(source, *args):
        network = run_before(source, *args)
        alive.add(network)
        return network

    exported: list[tuple[int, ...]] = []

    def noted(model, x, **kwargs):
        exported.append(tuple(x.shape))
        return to_onnx(model, x, **kwargs)

    name = "run_openvino" if backend == "openvino" else "run_onnx"
    run_before = getattr(export, name)
    monkeypatch.setattr(export, name, run)
    monkeypatch.setattr(export, "to_onnx", noted)
    fast = res2net_zoo.optimize(tiny, images(4, 3, 64, 64), backend=backend, cache_dir=tmp_path)
    assert fast.backend == backend
    for n in (1, 2, 3, 5):
        fast(images(n, 3, 64, 64))
    assert exported == [(4, 3, 64, 64), (1, 3, 64, 64)]
    for size in (32, 40, 48):
        x = images(2, 3, size, size)
        with torch.no_grad():
            assert relative_error(fast(x), tiny(x)) < 1e-4
        gc.collect()
        assert len(alive) <= backends.KEPT
    assert len(exported) == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"backend": "warp"}',
        '{"backend": "native"}',
        '{"backend": "cudagraphs", "milliseconds": {"cudagraphs": 1}}',
    ],
)
def test_damaged_choice_is_repeated(tiny, tmp_path, monkeypatch, text):
    monkeypatch.setattr(optimization, "candidates", lambda *_: ["native", "eager"])
    res2net_zoo.optimize(tiny, images(1, 3, 32, 32), cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(text)
    assert res2net_zoo.optimize(tiny, images(1, 3, 32, 32), cache_dir=tmp_path).milliseconds
    assert json.loads(file.read_text())["backend"] in ("native", "eager")


def test_failing_backend_is_replaced_with_a_warning(tiny, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(optimization, "candidates", lambda *_: ["native", "eager"])
    monkeypatch.setitem(optimization.BACKENDS, "native", broken)
    with pytest.warns(UserWarning, match="native cannot run this model here .*no such luck"):
        fast = res2net_zoo.optimize(tiny, images(1, 3, 32, 32), backend="native", cache_dir=tmp_path)
    assert fast.backend == "eager"
    monkeypatch.setattr(optimization, "candidates", lambda *_: ["eager"])
    with pytest.warns(UserWarning, match="CUDA graphs need an NVIDIA GPU"):
        fast = res2net_zoo.optimize(tiny, images(1, 3, 32, 32), backend="cudagraphs", cache_dir=tmp_path)


def test_backend_with_wrong_logits_is_not_used(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "candidates", lambda *_: ["native", "eager"])
    monkeypatch.setitem(optimization.BACKENDS, "native", lambda model, *_: lambda x: 1.001 * model(x))
    with pytest.warns(UserWarning, match="differ by 0.001"):
        assert res2net_zoo.optimize(tiny, images(1, 3, 32, 32), cache_dir=tmp_path).backend == "eager"


def test_untraceable_model_runs_in_eager_mode(tmp_path, monkeypatch):
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.bn(self.conv(x)).mean((2, 3))
            return x if x.sum() > 0 else 2 * x

    monkeypatch.setattr(optimization, "candidates", lambda *_: ["native", "eager"])
    model = spread(Strange()).eval()
    with pytest.warns(UserWarning, match="native cannot run"):
        fast = res2net_zoo.optimize(model, images(2, 3, 9, 9), cache_dir=tmp_path)
    with torch.no_grad():
        assert relative_error(fast(images(2, 3, 9, 9)), model(images(2, 3, 9, 9))) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(precision="float8"), "precision is 'float8'; it must be one of float32, bfloat16, float16"),
        (dict(precision="float16"), "float16 needs a GPU"),
        (dict(backend="tensorrt"), "backend is 'tensorrt'; it must be one of auto, native"),
        (dict(example_input=torch.zeros(3, 32, 32)), r"it must be \(N, C, H, W\) floats"),
        (dict(example_input=torch.zeros(0, 3, 32, 32)), r"it must be \(N, C, H, W\) floats"),
        (dict(example_input=torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), r"it must be \(N, C, H, W\) floats"),
        (dict(model=nn.Flatten(2)), r"not logits \(N, classes\)"),
        (dict(example_input=torch.full((1, 3, 32, 32), float("nan"))), "example_input has NaN or infinite values"),
    ],
)
def test_invalid_arguments(tiny, arguments, words):
    with pytest.raises(ValueError, match=words):
        res2net_zoo.optimize(**{"model": tiny, "example_input": torch.zeros(1, 3, 32, 32), **arguments})


@pytest.mark.parametrize("name", SMALL)
def test_reparameterize_model_folds_the_blocks(name):
    model = spread(timm.create_model(name, num_classes=7, **SMALL[name])).eval()
    folded = reparameterize_model(model)
    kinds = [(path, type(module)) for path, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert not [path for path, _ in kinds if ".bns." in path or path.endswith(("bn3",))]
    with torch.no_grad():
        assert relative_error(folded(images(2, 3, 64, 64)), model(images(2, 3, 64, 64))) < 1e-5
    everywhere = optimization.fold_batch_norm(model)
    assert not [module for module in everywhere.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", SMALL)
def test_padded_widths_keep_the_output(name):
    model = spread(timm.create_model(name, num_classes=7, **SMALL[name])).eval()
    padded, x = optimization.fold_batch_norm(model, 16), images(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(padded(x), model(x)) < 1e-5
    widths = [conv.out_channels for path, conv in padded.named_modules() if ".convs." in path and conv.groups == 1]
    assert all(width % 16 == 0 for width in widths)
    assert widths or "next" in name


def test_other_norms_are_kept():
    model = timm.create_model("res2net_tiny", norm_layer="groupnorm1").eval()
    with torch.no_grad():
        assert relative_error(reparameterize_model(model)(images(1, 3, 64, 64)), model(images(1, 3, 64, 64))) < 1e-6


def test_importing_the_package_does_not_import_backends(program):
    rooms = ("res2net_zoo.inference", "res2net_zoo.kernels.cpu_network")
    code = f"import sys, res2net_zoo; print([m for m in sys.modules if m.startswith({rooms})])"
    assert program("-c", code).stdout.strip() == "[]"


def test_check_raises_unavailable():
    with pytest.raises(Unavailable, match=r"returns \(2, 3\) instead of \(2, 4\)"):
        optimization.check(torch.zeros(2, 3), torch.zeros(2, 4), "float32")
    with pytest.raises(Unavailable, match="differ by nan"):
        optimization.check(torch.full((2, 3), float("nan")), torch.ones(2, 3), "bfloat16")


def test_source_is_in_the_package():
    assert Path(cpu_network.__file__).with_name("cpu_network.cpp").is_file()
