"""Tests of the native steps in 8-bit integers, against integer arithmetic, by each instruction set of this machine."""

import contextlib
import functools
import math
from collections.abc import Iterator
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
from res2net_zoo.kernels.quantization import Scale, calibrate, quantize_weight
from tests.conftest import FEW, SMALL, relative_error, spread

CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
# By name: what a processor needs to run the code, and the compiler's flags for it.
INSTRUCTIONS = {
    "native": ("", ()),
    "avx512_vnni": ("avx512_vnni", ("-mno-amx-int8",)),
    "avx_vnni": ("avx_vnni", ("-mno-avx512f",)),
    "avx512": ("avx512vl", ("-march=skylake-avx512",)),
    "avx2": ("avx2", ("-march=haswell",)),
    "portable": ("sse2", ("-march=x86-64",)),
}
pytestmark = pytest.mark.first_case


@contextlib.contextmanager
def compiled_for(name: str) -> Iterator[None]:
    """Use the native steps compiled for an instruction set."""
    needed, flags = INSTRUCTIONS[name]
    if needed not in CPUINFO:
        pytest.skip(f"this processor does not have {needed}")
    before, compiler.FLAGS = compiler.FLAGS, (*compiler.FLAGS, *flags)
    cpu_network.library.cache_clear()
    try:
        if "VNNI" not in name and name != "native":
            assert not cpu_network.library().tiled_pixels()
        yield
    finally:
        compiler.FLAGS = before
        cpu_network.library.cache_clear()


class Layers(nn.Module):
    """A convolution with what follows it in a Res2Net block, and one that returns the integers of its output.

    Args:
        layer: The convolution.
        after: `nothing`; `shortcut`, whose input is added to the output; or `sum`, whose output is added to the
            second half of the convolution before it (Eq. 1).
        relu: Whether an activation follows.
    """

    def __init__(self, layer: nn.Conv2d, after: str, relu: bool) -> None:
        super().__init__()
        self.layer, self.after, self.relu = layer, after, nn.ReLU() if relu else nn.Identity()
        if after == "sum":
            self.before = nn.Conv2d(layer.in_channels, 2 * layer.in_channels, 1)
        self.integers = nn.Conv2d(layer.out_channels, layer.out_channels, 1, bias=False)
        nn.init.dirac_(self.integers.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.after == "sum":
            first, second = torch.chunk(self.before(x), 2, dim=1)
            return self.integers(self.relu(self.layer(first)) + second)
        y = self.layer(x)
        return self.integers(self.relu(y + x if self.after == "shortcut" else y))


def exactly(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return values in units of the integers of a scale, before rounding."""
    return x / scale.scale + scale.zero


def integers(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    return exactly(x, scale).round().clamp(0, 255)


def convolve(conv: nn.Conv2d, q: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Convolve integers, and return real values, all in float64, which has the integers exactly."""
    weight, steps = quantize_weight(conv.weight.detach())
    bias = None if conv.bias is None else conv.bias.detach().double()
    real = F.conv2d(q - scale.zero, weight.double(), None, conv.stride, conv.padding, conv.dilation, conv.groups) * (
        scale.scale * steps.double().view(-1, 1, 1)
    )
    return real if bias is None else real + bias.view(-1, 1, 1)


def in_the_middle(exact: torch.Tensor) -> torch.Tensor:
    """Return which values are so close to the middle of two integers that sums in float32 may round them to either."""
    return ((exact - exact.floor()) - 0.5).abs() < 1e-3


@torch.no_grad()
def reference(graph: fx.GraphModule, model: Layers, x: torch.Tensor) -> tuple[torch.Tensor, Scale, torch.Tensor]:
    """Compute the output of a layer in integers.

    Returns:
        The output in units of the integers of its scale, before rounding; the scale; and which of its pixels (N, 1, H,
        W) depend on integers that can be rounded to either side.
    """
    scales = calibrate(graph, x)
    source, last = scales["x"], scales["relu"]
    q = integers(x.double(), source)
    if model.after == "sum":
        whole, total = scales["before"], scales["add"]
        before = convolve(model.before, q, source)
        unsure = in_the_middle(exactly(before, whole)).any(1, keepdim=True).double()
        size = model.layer.kernel_size
        unsure = F.max_pool2d(unsure, size, 1, model.layer.padding) > 0
        first, second = integers(before, whole).chunk(2, 1)
        y = model.relu(convolve(model.layer, first, whole)) + (second - whole.zero) * whole.scale
        return exactly(y, total), total, unsure
    y = convolve(model.layer, q, source)
    if model.after == "shortcut":
        y = y + (q - source.zero) * source.scale
    return exactly(model.relu(y), last), last, torch.zeros_like(y[:, :1], dtype=torch.bool)


@st.composite
def layers(draw) -> tuple[Layers, torch.Tensor]:
    after = draw(st.sampled_from(("nothing", "shortcut", "sum")))
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    chs = groups * draw(st.integers(1, 40))
    out = chs if after != "nothing" else groups * draw(st.integers(1, 70))
    kernel = draw(st.sampled_from((1, 1, 3, 5)))
    dilation = draw(st.integers(1, 2)) if after == "nothing" else 1
    stride = draw(st.integers(1, 2)) if after == "nothing" else 1
    padding = (kernel // 2) * dilation
    layer = nn.Conv2d(chs, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    h, w, n = draw(st.integers(1, 13)), draw(st.integers(2, 13)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    # Integers with a range of 255, so that the input's scale is 1 and its rounding exact.
    lowest = draw(st.sampled_from((0, 0, -100)))
    x = torch.randint(0, 256, (n, chs, h, w), generator=generator).float() + lowest
    x[:, 0, 0, 0], x[:, 0, 0, 1] = lowest, lowest + 255
    for parameter in (model := Layers(layer, after, draw(st.booleans()))).parameters():
        if parameter.ndim == 1 or parameter is not model.integers.weight:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval(), x


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_any_convolution_computes_the_integers(name):
    @settings(deadline=None, max_examples=40 if name == "native" else 15)
    @given(example=layers())
    def compare(example) -> None:
        model, x = example
        graph = fx.symbolic_trace(model)
        expected, scale, unsure = reference(graph, model, x)
        found = Network(graph, torch.int8, calibration=x)(x)
        # The last convolution multiplies by 127 / 127.
        q = exactly(found.double(), scale)
        assert (q - q.round()).abs().max() < 1e-2
        wrong = q.round() != expected.round().clamp(0, 255)
        assert not (wrong & ~in_the_middle(expected) & ~unsure).any()

    with compiled_for(name):
        compare()


@functools.cache
def family(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    few = FEW if name.startswith("res2net50") else SMALL.get(name, {})
    torch.manual_seed(0)
    model = spread(timm.create_model(name, num_classes=7, **few)).eval()
    smooth = F.interpolate(
        torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), size=96, mode="bilinear"
    )
    return model, fold_batch_norm(model), smooth


@functools.cache
def native_logits(name: str) -> torch.Tensor:
    _, folded, x = family(name)
    return Network(folded, torch.int8, calibration=x)(x)


@pytest.mark.parametrize("name", [*SMALL, "res2net_tiny", "resnet18"])
def test_families_agree_with_float32(name):
    model, _, x = family(name)
    with torch.no_grad():
        expected = model(x)
    found = native_logits(name)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 0.05


@pytest.mark.parametrize("instructions", [name for name in INSTRUCTIONS if name != "native"])
@pytest.mark.parametrize("name", ["res2net50_26w_4s", "seres2next29_6c_24w_4s", "dla60_res2next"])
def test_each_instruction_set_returns_the_same_bits(name, instructions):
    expected = native_logits(name)
    _, folded, x = family(name)
    with compiled_for(instructions):
        assert torch.equal(Network(folded, torch.int8, calibration=x)(x), expected)


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "blres2net50"])
def test_other_sizes_numbers_and_threads(name):
    model, folded, x = family(name)
    net = Network(folded, torch.int8, calibration=x)
    whole = net(x)
    assert torch.equal(torch.cat([net(one[None]) for one in x]), whole)
    assert net(x[:0]).shape == (0, 7)
    torch.set_num_threads(3)
    assert torch.equal(net(x), whole)
    smaller = F.interpolate(x, size=(64, 96))
    with torch.no_grad():
        assert relative_error(net(smaller), model(smaller)) < 0.15


def test_feature_maps():
    model = timm.create_model("res2net_tiny", features_only=True).eval()
    x = F.interpolate(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), size=64, mode="bilinear")
    maps = Network(fold_batch_norm(model), torch.int8, calibration=x)(x)
    with torch.no_grad():
        for found, expected in zip(maps, model(x), strict=True):
            assert relative_error(found, expected) < 0.05


def test_calibration_is_required():
    _, folded, _ = family("res2net_tiny")
    with pytest.raises(Unsupported, match="needs calibration images"):
        Network(folded, torch.int8)


def test_sums_that_can_overflow():
    wide = fx.symbolic_trace(nn.Sequential(nn.Conv2d(70_000, 1, 1)))
    x = torch.rand(1, 70_000, 1, 1)
    with pytest.raises(Unsupported, match="overflow 32 bits"):
        Network(wide, torch.int8, calibration=x)(x)


def test_scales():
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU()))
    graph.get_submodule("0").weight.data.fill_(2)
    x = torch.tensor([[-2.0, 3], [-1, 4]]).view(2, 1, 1, 2)
    scales = calibrate(graph, x)
    assert scales["input_1"] == Scale(pytest.approx(6 / 255), 85)
    assert scales["_0"] == Scale(pytest.approx(12 / 255), 85)
    assert scales["_1"] == Scale(pytest.approx(8 / 255), 0)


def test_weights_are_symmetric_for_each_channel():
    weight = torch.tensor([[1.0, -0.5], [0, 0], [300, 1]])
    q, scale = quantize_weight(weight)
    assert q.tolist() == [[127, -64], [0, 0], [127, 0]]
    assert scale.tolist() == pytest.approx([1 / 127, 1 / 127, 300 / 127])
    assert math.isclose((q[2, 0] * scale[2]).item(), 300, rel_tol=1e-6)
