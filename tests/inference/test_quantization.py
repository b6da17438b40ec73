"""Tests of `res2net_zoo.optimize` in int8: calibration images, accuracy, layers in float, and errors."""

import copy
import json
import logging
import sys

import numpy as np
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import res2net_zoo
from res2net_zoo.data.sources import open_source
from res2net_zoo.inference import optimization, quantization
from res2net_zoo.inference.backends import BACKENDS, QuantizedNetwork, Quantizer
from res2net_zoo.inference.export import load_images, to_onnx, to_openvino
from res2net_zoo.inference.quantization import (
    MINIMUM,
    check_calibration,
    quantize_onnx,
    quantize_openvino,
    rms_error,
)
from tests.conftest import SHIPPED_DATA, SHIPPED_MODEL, SMALL, spread

pytestmark = pytest.mark.first_case

LIBRARIES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return timm.create_model(f"local-dir:{SHIPPED_MODEL}", pretrained=True).eval()


@pytest.fixture(scope="module")
def digits(tiny) -> torch.Tensor:
    """100 training digits."""
    return load_images(tiny, list(open_source(str(SHIPPED_DATA), "train").rows.take(100)))


def run_by(monkeypatch, **calls) -> None:
    """Replace the backends by functions of a model that return a function of images."""
    monkeypatch.setattr(optimization, "candidates", lambda *_: list(calls))
    for name, make in calls.items():
        monkeypatch.setitem(BACKENDS, name, lambda model, *_, make=make: make(model))


@pytest.mark.parametrize("backend", LIBRARIES)
def test_accuracy_on_the_shipped_data(tiny, digits, backend, tmp_path, monkeypatch, capfd):
    """Within 0.5 points of float32; other sizes and numbers of images use the same quantization, without output."""
    rows = list(open_source(str(SHIPPED_DATA), "validation").rows)
    images, labels = load_images(tiny, rows), torch.tensor([row["label"] for row in rows])
    quantize, times = getattr(quantization, name := f"quantize_{backend.removesuffix('runtime')}"), []
    monkeypatch.setattr(quantization, name, lambda *args: times.append(1) or quantize(*args))
    handlers = logging.getLogger().handlers[:]
    capfd.readouterr()
    fast = res2net_zoo.optimize(tiny, images[:4], "int8", backend, digits, cache_dir=tmp_path)
    assert (fast.backend, fast.precision, fast.calibration_images, fast.float_layers) == (backend, "int8", 100, ())
    with torch.no_grad():
        expected, found = tiny(images), fast(images)
        small, strange = F.interpolate(images[:3], (48, 56)), images[:2].clone()
        strange[0, 0, 5, 5] = float("nan")
        assert rms_error(fast(small), tiny(small)) < 0.1
        assert fast(strange)[0].isnan().all() and not fast(strange)[1].isnan().any()
    assert found.dtype == torch.float32
    assert 0 < rms_error(found, expected) < 0.06
    right = [(logits.argmax(1) == labels).float().mean().item() for logits in (found, expected)]
    assert abs(right[0] - right[1]) <= 0.005
    assert len(times) == 1
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers and logging.getLoggerClass() is logging.Logger
    assert "openvino_telemetry" not in sys.modules


def test_native_steps_on_the_shipped_data(tiny, digits, tmp_path):
    rows = list(open_source(str(SHIPPED_DATA), "validation").rows)
    images, labels = load_images(tiny, rows), torch.tensor([row["label"] for row in rows])
    images[0, 0, 5, 5] = float("inf")
    fast = res2net_zoo.optimize(tiny, images[1:5], "int8", "native", digits, cache_dir=tmp_path)
    assert (fast.backend, fast.calibration_images, fast.float_layers) == ("native", 100, ())
    with torch.no_grad():
        expected, found = tiny(images), fast(images)
    assert found[0].isnan().all() and not found[1:].isnan().any()
    assert 0 < rms_error(found[1:], expected[1:]) < 0.04
    right = [(logits.argmax(1) == labels)[1:].float().mean().item() for logits in (found, expected)]
    assert abs(right[0] - right[1]) <= 0.005


@pytest.mark.parametrize("half_range", [False, True])
def test_weights_of_onnx_are_symmetric_per_channel(tiny, digits, half_range):
    """With 7 bits for processors whose sums of 8-bit products saturate."""
    proto = to_onnx(tiny, digits[:1])
    before = proto.SerializeToString()
    quantized = quantize_onnx(proto, digits[:MINIMUM], half_range)
    assert proto.SerializeToString() == before
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    weights = [name for name in tensors if name.endswith("weight_quantized")]
    assert len(weights) == 38
    for name in weights:
        values, scales, zeros = (
            tensors[name],
            *(tensors[name.replace("quantized", key)] for key in ("scale", "zero_point")),
        )
        assert values.dtype == np.int8 and scales.shape == (len(values),) and not zeros.any()
        assert np.abs(values.astype(int)).max() in ((63, 64) if half_range else (127, 128))


@pytest.mark.full
@pytest.mark.parametrize(("half_range", "largest"), [(False, 127), (True, 63)])
def test_weights_of_openvino_are_symmetric_per_channel(tiny, digits, half_range, largest):
    quantized = quantize_openvino(to_openvino(tiny, digits[:1]), digits[:MINIMUM], half_range)
    constants = [op for op in quantized.get_ordered_ops() if op.get_type_name() == "Constant"]
    weights = [constant.data for constant in constants if constant.data.dtype == np.int8]
    assert len(weights) == 38
    for values in weights:
        channels = np.abs(values.astype(int)).reshape(len(values), -1).max(1)
        assert np.median(channels) == largest and channels.max() <= largest + 1  # some channels are almost zero


@pytest.mark.parametrize("backend", LIBRARIES)
def test_weights_in_channels_last_are_quantized_the_same(tiny, digits, backend, tmp_path):
    fast = [
        res2net_zoo.optimize(model, digits[:4], "int8", backend, digits, cache_dir=tmp_path)(digits[:8])
        for model in (tiny, copy.deepcopy(tiny).to(memory_format=torch.channels_last))
    ]
    assert torch.allclose(*fast, atol=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("name", SMALL)
def test_every_wiring(digits, name, backend, tmp_path):
    """Also at another size, for which Big-Little Net is quantized again."""
    torch.manual_seed(0)
    model = spread(timm.create_model(name, num_classes=7, **SMALL[name])).eval()
    fast = res2net_zoo.optimize(model, digits[:2], "int8", backend, digits[:40], cache_dir=tmp_path)
    assert fast.backend == backend
    se = name.startswith("se") and backend == "openvino"  # NNCF leaves the gates in float
    assert bool(fast.float_layers) == se and all(".se." in layer for layer in fast.float_layers)
    larger = F.interpolate(digits[40:43], (96, 96))
    with torch.no_grad():
        assert rms_error(fast(digits[40:]), model(digits[40:])) < 0.1
        assert rms_error(fast(larger), model(larger)) < 0.1


@pytest.mark.full
def test_auto_takes_the_fastest(tiny, digits, tmp_path):
    fast = res2net_zoo.optimize(tiny, digits[:2], "int8", calibration=[digits[:30], digits[30:]], cache_dir=tmp_path)
    assert set(LIBRARIES) <= set(fast.milliseconds)
    assert fast.backend == min(fast.milliseconds, key=lambda name: fast.milliseconds[name])


def images(number: int = MINIMUM, channels: int = 3, size: int = 16) -> torch.Tensor:
    """Return smooth images whose pixels are from -1.5 to 1.5."""
    coarse = torch.rand(number, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return 3 * F.interpolate(coarse, (size, size), mode="bilinear") - 1.5


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, "int8 needs calibration images"),
        ([], "there are 0 calibration images; int8 needs at least 32"),
        (images(MINIMUM - 1), "there are 31 calibration images; int8 needs at least 32"),
        (torch.randn(MINIMUM, 3, 16, 16), "calibration images look like random noise"),
        (torch.rand(MINIMUM, 3, 16, 16), "calibration images look like random noise"),
        (torch.ones(MINIMUM, 3, 16, 16), "calibration images look like constant"),
        (images(channels=1), "calibration images have 1 channels; the model needs 3"),
        (images()[0], r"calibration images are \(3, 16, 16\), torch.float32; they must be preprocessed"),
        (images().byte(), r"torch.uint8; they must be preprocessed images, \(N, C, H, W\) floats"),
        ([(images(), torch.zeros(MINIMUM))], "calibration images are tuple"),
        ([images(), images(size=24)], "calibration images have different sizes"),
        (images() / 0, "calibration images have NaN or infinite pixels"),
        (images(size=24), "calibration images are 24x24 and example_input is 16x16; use the same size"),
    ],
)
def test_invalid_calibration(tiny, calibration, words):
    with pytest.raises(ValueError, match=words):
        res2net_zoo.optimize(tiny, images(2), "int8", calibration=calibration)


def test_a_few_hundred_images_are_used(tiny):
    many = images(700)
    assert torch.equal(check_calibration(tiny, many)[[0, -1]], many[[0, 697]])
    assert torch.equal(check_calibration(tiny, iter(many.split(128))), many[:300])
    assert len(check_calibration(nn.Flatten(), images(40).double())) == 40


@pytest.mark.parametrize("change", ["255", "0 to 1", "-1 to 1"])
def test_images_of_another_normalization(tiny, change):
    pixels = (images() + 1.5) / 3
    wrong = {"255": 255 * pixels, "0 to 1": pixels, "-1 to 1": 2 * pixels - 1}[change]
    with pytest.warns(UserWarning, match=r"pixels of the calibration images are from .* gives -2.12 to 2.64"):
        check_calibration(tiny, wrong)


def test_images_of_the_models_normalization(tiny, digits, recwarn):
    check_calibration(tiny, digits)
    assert not recwarn


def test_processor_without_vnni(tiny, tmp_path, monkeypatch):
    run_by(monkeypatch, openvino=lambda model: model)
    monkeypatch.setattr(quantization, "instruction_sets", lambda: {"avx2", "avx512f"})
    with pytest.warns(UserWarning, match="no VNNI instructions; int8 is hardly faster than float32"):
        fast = res2net_zoo.optimize(tiny, images(2), "int8", calibration=images(), cache_dir=tmp_path)
    assert fast.backend == "openvino"
    for known in (None, {"avx2", "avx_vnni"}, {"asimd", "asimddp"}):
        monkeypatch.setattr(quantization, "instruction_sets", lambda known=known: known)
        assert quantization.has_int8_instructions()


@pytest.mark.parametrize(("instructions", "half_range"), [({"avx2"}, True), ({"avx2", "avx_vnni"}, False)])
def test_weights_have_7_bits_without_vnni(monkeypatch, instructions, half_range):
    found = []
    monkeypatch.setattr(quantization, "instruction_sets", lambda: instructions)
    monkeypatch.setattr(quantization, "float_layers", lambda quantized: [])
    tools = Quantizer(
        lambda *_: None, lambda exported, images, half: found.append(half), lambda *_: None, lambda _: None
    )
    QuantizedNetwork(nn.Flatten(), images(2), images(), tools)
    assert found == [half_range]


def test_layers_that_remain_in_float_are_named(tmp_path, monkeypatch):
    model = timm.create_model("res2net_tiny", norm_layer="groupnorm1").eval()
    run_by(monkeypatch, openvino=lambda model: model)
    with pytest.warns(UserWarning, match="layers that remain in float: conv1.1, .* and 29 more"):
        fast = res2net_zoo.optimize(model, images(2), "int8", calibration=images(), cache_dir=tmp_path)
    assert {"bn1", "layer1.0.bns.0"} <= set(fast.float_layers) and len(fast.float_layers) == 37


def test_backend_with_wrong_logits_is_not_used(tiny, tmp_path, monkeypatch):
    run_by(monkeypatch, openvino=lambda model: lambda x: 0.7 * model(x), onnxruntime=lambda model: model)
    fast = res2net_zoo.optimize(tiny, images(3), "int8", calibration=images(), cache_dir=tmp_path)
    assert set(fast.milliseconds) == {"onnxruntime"}
    with pytest.warns(UserWarning, match="the error of its logits is 0.3 of the logits, more than 0.25"):
        res2net_zoo.optimize(tiny, images(3), "int8", "openvino", images(), cache_dir=tmp_path)


def test_choice_depends_on_the_calibration_images(tiny, tmp_path, monkeypatch):
    run_by(monkeypatch, openvino=lambda model: model, onnxruntime=lambda model: model)
    monkeypatch.setattr(optimization, "_takes", lambda *_: True)
    for calibration, compared in ((images(), True), (images(), False), (images(40), True), (images() + 0.1, True)):
        fast = res2net_zoo.optimize(tiny, images(2), "int8", calibration=calibration, cache_dir=tmp_path)
        assert bool(fast.milliseconds) == compared
    assert bool(res2net_zoo.optimize(tiny, images(2), cache_dir=tmp_path).milliseconds)
    assert all(set(json.loads(file.read_text())) == {"backend", "milliseconds"} for file in tmp_path.rglob("*.json"))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_backends_without_int8_are_replaced(tiny, tmp_path, monkeypatch, backend):
    run_by(monkeypatch, openvino=lambda model: model)
    with pytest.warns(UserWarning, match=f"the backend {backend} cannot run this model here .*in float only"):
        fast = res2net_zoo.optimize(tiny, images(2), "int8", backend, images(), cache_dir=tmp_path)
    assert fast.backend == "openvino"


def test_no_library_is_installed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "find_spec", lambda name: None)
    monkeypatch.setitem(BACKENDS, "native", lambda model, *_: lambda x: 0 * model(x))
    with pytest.raises(ValueError, match=r"in int8: native: .*pip install 'res2net-zoo\[int8\]'"):
        res2net_zoo.optimize(tiny, images(2), "int8", calibration=images(), cache_dir=tmp_path)


def test_other_devices(tiny):
    with pytest.raises(ValueError, match="int8 is supported on CPUs only; use bfloat16 or float16 on a GPU"):
        res2net_zoo.optimize(tiny, torch.zeros(1, 3, 16, 16, device="meta"), "int8", calibration=images())
