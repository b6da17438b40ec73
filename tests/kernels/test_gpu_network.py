"""Tests of the Triton kernels: on a GPU, or without one in Triton's interpreter."""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import fx, nn

from res2net_zoo.inference.optimization import fold_batch_norm
from tests.conftest import ROOT, SMALL, relative_error, spread

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check_convolutions() -> None:
    """Compare convolutions of slices with float64, for each way to write the result."""
    from res2net_zoo.kernels.gpu_network import Convolution, GpuNetwork

    generator = torch.Generator().manual_seed(0)
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    dtypes = [torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]
    cases = [
        # kernel, stride, dilation, input channels, output channels, what else
        (1, 1, 1, 24, 40, ""),
        (1, 2, 1, 24, 16, "relu add"),
        (3, 1, 1, 24, 24, "relu also"),
        (3, 2, 1, 26, 26, "relu"),
        (3, 1, 2, 16, 40, "add"),
        (1, 1, 1, 40, 32, "relu parts"),
    ]

    def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    for dtype, (kernel, stride, dilation, chs_in, chs_out, what) in itertools.product(dtypes, cases):
        conv = nn.Conv2d(chs_in, chs_out, kernel, stride, dilation * (kernel // 2), dilation).to(DEVICE, dtype)
        whole = random(dtype, 2, 9, 7, chs_in + 16)
        src = whole[..., 8 : 8 + chs_in]
        expected = F.conv2d(
            src.permute(0, 3, 1, 2).double().cpu(), conv.weight.double().cpu(), conv.bias.double().cpu(),
            stride, dilation * (kernel // 2), dilation,
        ).permute(0, 2, 3, 1).detach()  # fmt: skip
        _, h, w, _ = expected.shape
        out = torch.full((2, h, w, chs_out + 16), float("nan")).to(DEVICE, dtype)
        first = 24 if "parts" in what else chs_out
        dst = out[..., 8 : 8 + first]
        rest = torch.full_like(out, float("nan"))[..., : chs_out - first] if "parts" in what else None
        add = random(dtype, 2, h, w, chs_out) if "add" in what else None
        also = random(dtype, 2, h, w, chs_out + 8)[..., 8:] if "also" in what else None
        before = None if also is None else also.double().cpu()
        if add is not None:
            expected = expected + add.double().cpu()
        if "relu" in what:
            expected = expected.relu()
        network = GpuNetwork(fx.symbolic_trace(nn.Identity()), dtype, torch.device(DEVICE))
        geometry = (kernel, kernel, stride, dilation * (kernel // 2), dilation)
        step = Convolution(src, dst, network.packed(conv, False), geometry, chs_out, "relu" in what, add, rest, also)
        for tile, split in (((64, 32, 32, 4, 2), 1), ((16, 16, 16, 4, 2), 2)):
            dst.fill_(float("nan"))
            if also is not None:
                also.copy_(before)
            step.choose(tile, split, network.scratch(*step.room(tile, split)))
            step()
            found = dst if rest is None else torch.cat([dst, rest], -1)
            name = f"{dtype} {kernel} {stride} {dilation} {what} {tile} {split}"
            assert relative_error(found.double().cpu(), expected) < TOLERANCE[dtype], name
            assert out[..., :8].isnan().all() and out[..., 8 + first :].isnan().all(), name
            if also is not None:
                assert relative_error(also.double().cpu(), before + expected) < TOLERANCE[dtype], name


def check_nan() -> None:
    """Check that NaN stays in its pixel and is not removed by ReLU."""
    from res2net_zoo.kernels.gpu_network import Convolution, GpuNetwork

    conv = nn.Conv2d(16, 16, 1).to(DEVICE)
    src = torch.randn(1, 4, 4, 16, device=DEVICE).half()
    src[0, 0, 0] = float("nan")
    network, dst = GpuNetwork(fx.symbolic_trace(nn.Identity()), src.dtype, src.device), torch.zeros_like(src)
    Convolution(src, dst, network.packed(conv, False), (1, 1, 1, 0, 1), 16, relu=True)()
    assert dst[0, 0, 0].isnan().all() and not dst[0, 0, 1:].isnan().any() and not dst[0, 1:].isnan().any()


def check_networks() -> None:
    """Compare the logits of small networks with the models'."""
    from res2net_zoo.kernels.gpu_network import GpuNetwork

    for name in sys.argv[2:]:
        model = spread(timm.create_model(name, num_classes=7, **SMALL[name])).eval()
        folded = fold_batch_norm(model, 8)
        graph = folded if isinstance(folded, fx.GraphModule) else fx.symbolic_trace(folded)
        images = torch.randn(2, 3, 32, 64)
        network = GpuNetwork(graph.to(DEVICE), torch.float16, torch.device(DEVICE))
        program = network.program(images.shape)
        program.load(images.to(DEVICE))
        with torch.no_grad():
            assert relative_error(program.run().cpu(), model(images)) < 1e-2, name


def run(check: str, *names: str) -> None:
    """Run a check in a process of its own, because Triton chooses its interpreter when it is imported."""
    code = f"from tests.kernels import test_gpu_network as test; test.{check}()"
    subprocess.run(
        [sys.executable, "-c", code, "-", *names], cwd=ROOT, check=True,
        env=dict(os.environ, **({} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"})),
    )  # fmt: skip


def test_convolutions():
    run("check_convolutions")


@pytest.mark.full
def test_nan():
    run("check_nan")


@pytest.mark.full
def test_networks():
    run("check_networks", *SMALL)
