"""Tests of `res2net_zoo.kernels.cpu_network` against torch, for all families and any shape."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from res2net_zoo.inference.optimization import fold_batch_norm
from res2net_zoo.kernels import compiler, cpu_network
from res2net_zoo.kernels.cpu_network import Network, Unsupported
from tests.conftest import FEW, SMALL, relative_error, spread

pytestmark = pytest.mark.first_case

CPUINFO = Path("/proc/cpuinfo")
needs_bf16 = pytest.mark.skipif(
    not (CPUINFO.exists() and "avx512_bf16" in CPUINFO.read_text()),
    reason="this processor has no bfloat16 instructions",
)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """Computes logits from a layer's map, so that a Network can be built from any layer."""

    def __init__(self, *layers: nn.Module, chs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(chs, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.layers(x))).flatten(1)


def network(model: nn.Module, dtype: torch.dtype = torch.float32, **kwargs) -> Network:
    return Network(fx.symbolic_trace(model.eval()), dtype, **kwargs)


def small(name: str, **kwargs) -> nn.Module:
    few = FEW if name.startswith("res2net50") else SMALL.get(name, {})
    return spread(timm.create_model(name, **(kwargs or dict(num_classes=7)), **few)).eval()


@torch.no_grad()
def error(model: nn.Module, net: Network, x: torch.Tensor) -> float:
    return relative_error(net(x), model(x))


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("res2net50_14w_8s", "res2net50_48w_2s")]


@pytest.mark.parametrize("name", [*SMALL, "res2net_tiny", *LARGE, "resnet18"])
def test_all_families_with_any_batch_and_image_size(name):
    """More than 4 images are split, and large maps are processed image by image: both must be covered."""
    model = small(name)
    folded = fold_batch_norm(model)
    multiple = 32 if name.startswith("dla") else 1
    for n, h, w in ((1, 96, 64), (3, 61 // multiple * multiple + multiple, 96), (5, 32, 32), (2, 160, 160)):
        net = Network(folded)
        assert error(model, net, images(n, 3, h, w)) < 1e-5
        net.images_at_once = 3
        assert error(model, net, images(n + 4, 3, h, w)) < 1e-5


@pytest.mark.parametrize(
    "kwargs", [dict(output_stride=8, multi_grid=[3]), dict(dilations=(1, 1, 2, 4)), dict(output_stride=16)], ids=str
)
@pytest.mark.parametrize("name", ["res2net50_v1d_26w_4s", "res2net50_vd_26w_4s", "res2net50d", "res2net50_26w_4s"])
def test_dilated_models(name, kwargs):
    model = spread(timm.create_model(name, num_classes=7, **FEW, **kwargs)).eval()
    assert error(model, Network(fold_batch_norm(model)), images(2, 3, 97, 64)) < 1e-5


@needs_bf16
@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_as_accurate_as_torchs(name):
    model = small(name)
    x = images(2, 3, 96, 96)
    with torch.no_grad():
        expected, torchs = model(x), small(name).bfloat16()(x.bfloat16()).float()
    ours = Network(fold_batch_norm(model), torch.bfloat16)(x)
    assert relative_error(ours, expected) < max(0.02, 1.5 * relative_error(torchs, expected))


@torch.no_grad()
def check_maps(found, expected, tolerance: float = 1e-5) -> None:
    assert type(found) is type(expected) and len(found) == len(expected)
    for ours, torchs in zip(found, expected, strict=True):
        assert ours.shape == torchs.shape and ours.dtype == torch.float32
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(ours, torchs) < tolerance


@pytest.mark.parametrize("cut", [2**18, 1], ids=["one by one where large", "one by one where possible"])
@pytest.mark.parametrize("name", [*SMALL, "res2net_tiny", "resnet18"])
@torch.no_grad()
def test_maps_of_all_families(name, cut, monkeypatch):
    monkeypatch.setattr(cpu_network, "MAP_ELEMENTS", cut)
    model = small(name, features_only=True)
    net = Network(fold_batch_norm(model))
    for n, h, w in ((1, 96, 64), (3, 32, 32), (6, 160, 128), (2, 160, 160)):
        check_maps(net(images(n, 3, h, w)), model(images(n, 3, h, w)))
    assert [tuple(ours.shape) for ours in net(images(0, 3, 64, 64))] == [
        (0, *x.shape[1:]) for x in model(images(1, 3, 64, 64))
    ]


@needs_bf16
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_maps_in_bfloat16(name):
    model = small(name, features_only=True)
    for shape in ((1, 3, 64, 64), (5, 3, 160, 160)):
        check_maps(Network(fold_batch_norm(model), torch.bfloat16)(images(*shape)), model(images(*shape)), 0.05)


@torch.no_grad()
def test_maps_stay_valid_after_the_next_call():
    net = Network(fold_batch_norm(small("res2net_tiny", features_only=True)))
    x, other = images(2, 3, 64, 64), images(2, 3, 64, 64) + 1
    maps = net(x)
    copies = [x.clone() for x in maps]
    net(other)
    assert all(torch.equal(ours, copy) for ours, copy in zip(maps, copies, strict=True))
    assert all(torch.equal(ours, copy) for ours, copy in zip(net(x), copies, strict=True))


class Outputs(nn.Module):
    """Returns tensors that other operations read, write parts of, or fuse into."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor):
        y = self.conv(x)
        low, high = torch.chunk(y, 2, 1)
        match self.what:
            case "map":
                return y
            case "image":
                return x, y
            case "twice":
                return y, F.relu(y), y
            case "parts":
                return [low, high + low]
            case "concatenated":
                z = torch.cat([self.second(y), low], 1)
                return self.second(y) + y, z, torch.relu(z)
            case "logits":
                pooled = F.relu(self.second(y)).mean((2, 3), keepdim=True)
                return y, pooled, self.fc(torch.sigmoid(pooled).flatten(1)), pooled
        return None


@pytest.mark.parametrize("cut", [2**18, 1])
@pytest.mark.parametrize("what", ["map", "image", "twice", "parts", "concatenated"])
@torch.no_grad()
def test_outputs_that_are_read(what, cut, monkeypatch):
    monkeypatch.setattr(cpu_network, "MAP_ELEMENTS", cut)
    model = Outputs(what).eval()
    for n in (1, 3, 5):
        found, expected = network(model)(images(n, 3, 9, 7)), model(images(n, 3, 9, 7))
        check_maps(*([found], [expected]) if what == "map" else (found, expected))


@torch.no_grad()
def test_maps_and_logits_of_one_model():
    model = Outputs("logits").eval()
    *maps, logits, last = network(model)(images(5, 3, 9, 7))
    *expected, expected_logits, expected_last = model(images(5, 3, 9, 7))
    check_maps([*maps, last], [*expected, expected_last])
    assert logits.shape == (5, 5) and relative_error(logits, expected_logits) < 1e-5


@torch.no_grad()
def test_last_map_of_a_classifier():
    """`forward_features` of a model without pooling and classifier."""
    model = small("res2net_tiny", num_classes=0, global_pool="")
    check_maps([Network(fold_batch_norm(model))(images(3, 3, 32, 64))], [model(images(3, 3, 32, 64))])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_convolution(data):
    draw = data.draw
    groups = draw(st.sampled_from((1, 1, 2, 3, 8)))
    chs, out = groups * draw(st.integers(1, 21)), groups * draw(st.integers(1, 37))
    kernel, stride, dilation = (draw(st.tuples(*[st.integers(1, most)] * 2)) for most in (5, 3, 2))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    h, w = (
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 23))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    layer = nn.Conv2d(chs, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    model = Head(layer, nn.ReLU(), chs=out) if draw(st.booleans()) else Head(layer, chs=out)
    torch.set_num_threads(draw(st.integers(1, 3)))
    x = images(draw(st.integers(1, 3)), chs, h, w)
    assert error(model, network(model), x) < 1e-5
    if cpu_network.library().has_bf16():
        rounded = Head(layer, chs=out).bfloat16().float()
        rounded.load_state_dict({key: value.bfloat16().float() for key, value in model.state_dict().items()})
        assert error(model, network(model, torch.bfloat16), x.bfloat16().float()) < 0.05


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_pooling(data):
    draw = data.draw
    kernel, stride = draw(st.tuples(*[st.integers(1, 4)] * 2)), draw(st.tuples(*[st.integers(1, 3)] * 2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil_mode = draw(st.booleans())
    layer: nn.Module = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
    if draw(st.booleans()):
        layer = nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=draw(st.booleans()))
    chs = draw(st.integers(1, 40))
    x = images(2, chs, draw(st.integers(4, 17)), draw(st.integers(4, 17)))
    model = Head(layer, chs=chs)
    assert error(model, network(model), x) < 1e-5


def test_images_in_any_layout():
    model = small("res2net_tiny")
    net, x = Network(fold_batch_norm(model)), images(2, 3, 48, 64)
    expected = net(x)
    wide = images(4, 5, 60, 70)
    wide[1:3, 1:4, 5:53, 3:67] = x
    for other in (x.to(memory_format=torch.channels_last), wide[1:3, 1:4, 5:53, 3:67], x.double()):
        assert torch.equal(net(other), expected)
    assert torch.equal(net(x.mT.contiguous().mT), expected)
    assert net(x[:0]).shape == (0, 7)


def test_results_do_not_depend_on_threads_or_previous_calls():
    net, x = Network(fold_batch_norm(small("res2net50_26w_4s"))), images(3, 3, 64, 64)
    torch.set_num_threads(1)
    expected = net(x)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(5):
            net(images(1, 3, 96, 64))
            assert torch.equal(net(x), expected)


def test_calls_from_several_threads():
    net = Network(fold_batch_norm(small("res2net_tiny")))
    inputs = [images(1, 3, 32, 32) + i for i in range(4)]
    expected = [net(x) for x in inputs]
    wrong = []

    def call(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(net(inputs[i]), expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nan_propagates():
    net, x = Network(fold_batch_norm(small("res2net_tiny"))), images(2, 3, 32, 32)
    x[1, 0, 3, 3] = float("nan")
    logits = net(x)
    assert logits[0].isfinite().all() and logits[1].isnan().all()


def test_values_with_disjoint_lifetimes_share_memory():
    net = Network(fold_batch_norm(timm.create_model("res2net50_26w_4s").eval()))
    net(images(1, 3, 224, 224))
    (plan,) = net.programs.values()
    buffers = {tensor.data_ptr(): tensor.nbytes for tensor in plan.buffers.values()}
    assert sum(buffers.values()) < 45e6  # all maps together take 80 MB


class Odd(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.fc = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if self.what == "softmax":
            return F.softmax(x.mean((2, 3)), dim=1)
        if self.what == "broadcast":
            return x + x.mean((2, 3), keepdim=True)
        if self.what == "dict":
            return {"x": x}
        if self.what == "nested":
            return x, [x]
        return F.gelu(x)


@pytest.mark.parametrize("what", ["softmax", "broadcast", "dict", "nested", "gelu"])
def test_unsupported_operations(what):
    with pytest.raises(Unsupported):
        network(Odd(what))(images(1, 3, 8, 8))


def test_wrong_number_of_channels():
    with pytest.raises(Unsupported, match="does not fit an input of 4 x 8 x 8"):
        network(Head(nn.Conv2d(3, 8, 3), chs=8))(images(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, "no C++ compiler is installed"),
        ({"CXX": "false"}, "cannot compile cpu_network.cpp"),
    ],
)
def test_without_a_compiler(env, words, tmp_path):
    code = (
        "from res2net_zoo.kernels import cpu_network\n"
        "try:\n    cpu_network.library()\nexcept Exception as error:\n    print(error)"
    )
    run = [sys.executable, "-c", code]
    env = {**os.environ, "HF_ASSETS_CACHE": str(tmp_path), **env}
    assert words in subprocess.run(run, env=env, capture_output=True, text=True).stdout


@pytest.mark.full
@pytest.mark.parametrize("machine", ["haswell", "skylake-avx512"])
def test_on_other_processors(machine, monkeypatch):
    """This machine also runs the code for older processors."""
    if machine == "skylake-avx512" and cpu_network.library().lanes() == 8:
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, f"-march={machine}"))
    cpu_network.library.cache_clear()
    try:
        assert cpu_network.library().lanes() == (16 if machine == "skylake-avx512" else 8)
        model = small("seres2next29_6c_24w_4s")
        assert error(model, Network(fold_batch_norm(model)), images(2, 3, 33, 40)) < 1e-5
        with pytest.raises(Unsupported, match="does not support bfloat16"):
            Network(fold_batch_norm(model), torch.bfloat16)
    finally:
        monkeypatch.undo()
        cpu_network.library.cache_clear()
