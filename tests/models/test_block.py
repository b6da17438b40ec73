"""Tests of the Res2Net module: Eq. 1, wirings, and torch's execution modes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BlurPool2d, DropBlock2d, DropPath
from timm.models.res2net import Bottle2neck as TimmBottle2neck
from torch import nn

from res2net_zoo.models.block import Bottle2neck
from tests.conftest import relative_error, spread

BATCH_NORM = dict(norm_layer=nn.BatchNorm2d)
WIRINGS = ("official", "paddle", "mmdet")


class Smooth(nn.Softplus):
    """A smooth activation, as finite differences require."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()


def projection(stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(32, 64, 1, stride, bias=False), nn.BatchNorm2d(64))


def make(kind: str, wiring: str = "official", **kwargs) -> Bottle2neck:
    """Build a block of a stage: a plain one, the first one, or the first one with a stride."""
    stride = 2 if kind == "strided" else 1
    downsample = None if kind == "plain" else projection(stride)
    kwargs = {**BATCH_NORM, "base_width": 32, "wiring": wiring, **kwargs}
    return spread(Bottle2neck(64 if kind == "plain" else 32, 16, stride, downsample, **kwargs)).eval()


def images(kind: str, n: int = 2, height: int = 17, width: int = 20) -> torch.Tensor:
    return torch.randn(n, 64 if kind == "plain" else 32, height, width, generator=torch.Generator().manual_seed(1))


def equation_1(block: Bottle2neck, x: torch.Tensor, wiring: str) -> torch.Tensor:
    """Reference implementation of the block, following the paper and the parity notes."""
    strided = block.convs[0].stride[0] > 1
    first = strided or (wiring != "paddle" and block.downsample is not None)
    pools = first and (strided or wiring != "mmdet")
    x_groups = torch.relu(block.bn1(block.conv1(x))).split(block.convs[0].in_channels, 1)
    y_groups = []
    for i, (conv, bn) in enumerate(zip(block.convs, block.bns, strict=True)):
        before = x_groups[i] if first or i == 0 else x_groups[i] + y_groups[-1]
        y_groups.append(torch.relu(bn(conv(before))))
    if block.scale > 1:
        pooled = nn.functional.avg_pool2d(
            x_groups[-1], 3, block.convs[0].stride[0], 1, count_include_pad=wiring != "paddle"
        )
        y_groups.append(pooled if pools else x_groups[-1])
    y = block.bn3(block.conv3(torch.cat(y_groups, 1)))
    return torch.relu(y + (x if block.downsample is None else block.downsample(x)))


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("kind", ["plain", "first", "strided"])
@pytest.mark.parametrize("scale", [1, 2, 4, 7])
def test_matches_equation_1(wiring, kind, scale):
    block = make(kind, wiring, scale=scale)
    with torch.no_grad():
        assert relative_error(block(images(kind)), equation_1(block, images(kind), wiring)) < 1e-6


@pytest.mark.parametrize(
    ("wiring", "others"),
    [
        ("paddle", {"official": (True, False, False), "mmdet": (True, False, False)}),
        ("mmdet", {"official": (True, False, True), "paddle": (True, False, False)}),
    ],
)
def test_differences_of_wirings(wiring, others):
    with torch.no_grad():
        for other, equal in others.items():
            for kind, same in zip(("plain", "first", "strided"), equal, strict=True):
                one, two = make(kind, wiring), make(kind, other)
                two.load_state_dict(one.state_dict())
                assert torch.equal(one(images(kind)), two(images(kind))) == same, (other, kind)


@given(
    scale=st.integers(1, 8),
    width=st.integers(4, 40),
    cardinality=st.sampled_from([1, 2, 8]),
    kind=st.sampled_from(["plain", "first", "strided"]),
    dilation=st.sampled_from([1, 2, 4]),
    size=st.tuples(st.integers(0, 3), st.integers(1, 23), st.integers(1, 23)),
)
@settings(max_examples=60, deadline=None)
def test_equals_timm_on_its_weights(scale, width, cardinality, kind, dilation, size):
    stride = 2 if kind == "strided" else 1
    kwargs = dict(scale=scale, base_width=width, cardinality=cardinality, dilation=dilation, **BATCH_NORM)
    in_chs = 64 if kind == "plain" else 32
    ours = Bottle2neck(in_chs, 16, stride, None if kind == "plain" else projection(stride), **kwargs)
    theirs = TimmBottle2neck(in_chs, 16, stride, None if kind == "plain" else projection(stride), **kwargs)
    theirs = spread(theirs).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        x = images(kind, *size)
        ours_out, theirs_out = ours.eval()(x), theirs(x)
    assert ours_out.shape == theirs_out.shape
    if x.numel():
        assert relative_error(ours_out, theirs_out) < 1e-6


@pytest.mark.first_case
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("kind", ["plain", "first", "strided"])
def test_gradients_by_finite_differences(wiring, kind):
    block = make(kind, wiring, scale=3, base_width=8, act_layer=Smooth).double()
    x = images(kind, 1, 5, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)


@pytest.mark.parametrize("kind", ["plain", "first", "strided"])
def test_every_parameter_has_a_gradient(kind):
    block = make(kind, attn_layer="se").train()
    before = copy.deepcopy(block.state_dict())
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(images(kind)).square().mean().backward()
    optimizer.step()
    for name, _ in block.named_parameters():
        assert not torch.equal(before[name], block.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["plain", "first", "strided"])
class TestRunsUnder:
    """All execution modes of torch give the same results as eager mode."""

    def test_torchscript(self, kind):
        block, x = make(kind, attn_layer="se"), images(kind)
        with torch.no_grad():
            assert relative_error(torch.jit.script(block)(x), block(x)) < 1e-6

    def test_fx(self, kind):
        block, x = make(kind, attn_layer="se"), images(kind)
        with torch.no_grad():
            assert torch.equal(torch.fx.symbolic_trace(block)(x), block(x))

    def test_export_with_dynamic_batch_and_size(self, kind):
        """Passes with torch 2.14; with a stride it fails with 2.11, whose export fixes whether sizes are odd."""
        block, x = make(kind), images(kind)
        dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
        exported = torch.export.export(block, (x,), dynamic_shapes=(dims,)).module()
        other = images(kind, 5, 11, 14)
        with torch.no_grad():
            assert relative_error(exported(other), block(other)) < 1e-6

    def test_channels_last(self, kind):
        block, x = make(kind), images(kind)
        with torch.no_grad():
            fast = block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
            assert fast.is_contiguous(memory_format=torch.channels_last)
            assert relative_error(fast, make(kind)(x)) < 1e-6

    def test_autocast(self, kind):
        block, x = make(kind), images(kind)
        with torch.no_grad():
            full = block(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert block.conv1(x).dtype == torch.bfloat16
                half = block(x)
        assert 0 < relative_error(half.float(), full) < 0.05

    def test_no_images(self, kind):
        block = make(kind, attn_layer="se")
        assert block(images(kind, 0)).shape == (0, *block(images(kind, 1)).shape[1:])


@pytest.mark.full
def test_compiles():
    block, x = make("strided"), images("strided")
    with torch.no_grad():
        assert relative_error(torch.compile(block, fullgraph=True)(x), block(x)) < 1e-5


def test_squeeze_and_excitation_applies_to_the_output():
    block, x = make("first", attn_layer="se"), images("first")
    seen = []
    block.se.register_forward_hook(lambda module, args, output: seen.append((args[0], output.clone())))
    with torch.no_grad():
        out = block(x)
        (into, gated), shortcut = seen[0], block.downsample(x)
    assert into.shape == out.shape
    assert torch.equal(torch.relu(gated + shortcut), out)


def test_anti_aliasing_applies_the_stride():
    block = make("strided", aa_layer=BlurPool2d)
    assert {conv.stride for conv in block.convs} == {(1, 1)}
    assert isinstance(block.aa, BlurPool2d)
    assert block(images("strided")).shape == make("strided")(images("strided")).shape
    assert block.state_dict().keys() == make("strided").state_dict().keys()
    assert isinstance(make("plain", aa_layer=BlurPool2d).aa, nn.Identity)


def test_drop_block_and_stochastic_depth_work_in_training_only():
    block = make("first", drop_block=lambda: DropBlock2d(0.5, 3), drop_path=DropPath(0.5))
    x = images("first", 16)
    with torch.no_grad():
        assert torch.equal(block(x), make("first")(x))
        block.train()
        assert not torch.equal(block(x), block(x))
        block.drop_path.drop_prob = 1.0  # every image keeps only its shortcut
        assert torch.allclose(block(x), torch.relu(block.downsample(x)))


@pytest.mark.parametrize("dilated", [dict(dilation=2, first_dilation=1), dict(dilation=2, downsamples=True)])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_dilation_instead_of_stride_keeps_the_wiring(wiring, dilated):
    """The first block of a dilated stage, like that of a strided one, has no additions and pools one group.

    Only MMDetection does not pool it there.
    """
    kwargs = dict(wiring=wiring, base_width=32, **BATCH_NORM)
    strided = Bottle2neck(32, 16, 2, projection(2), **kwargs)
    unstrided = Bottle2neck(32, 16, 1, projection(1), **dilated, **kwargs)
    assert not strided.hierarchical and not unstrided.hierarchical
    assert isinstance(strided.pool, nn.AvgPool2d)
    assert isinstance(unstrided.pool, nn.Identity if wiring == "mmdet" else nn.AvgPool2d)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(scale=0), "scale"),
        (dict(wiring="mine"), "official, paddle, mmdet"),
        (dict(base_width=1), "channels"),
        (dict(reduce_first=2), "reduce_first"),
    ],
)
def test_invalid_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Bottle2neck(64, 16, **BATCH_NORM, **kwargs)
