"""Ablate the optimizations of native steps: speed ratios of interleaved timings. Run by hand.

`python -m tests.kernels.compare_native [--rounds 15] [--model res2net50_26w_4s]`
"""

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from unittest import mock

import timm
import torch
import torch.nn.functional as F

import res2net_zoo
from res2net_zoo.inference.optimization import fold_batch_norm
from res2net_zoo.kernels import compiler, cpu_network
from res2net_zoo.kernels.cpu_network import Network
from res2net_zoo.utils.timing import by_turns

VARIANTS = {
    "unmodified": contextlib.nullcontext,
    "no prefetch of weights": lambda: compiled_with("-DAHEAD=0"),
    "any pixel pitch": lambda: mock.patch.object(
        cpu_network.Value,
        "pitch",
        property(lambda value: value.c if value.c < 16 else -(-value.c // value.line) * value.line),
    ),
    "pages of 4 KB": lambda: mock.patch.object(
        cpu_network, "mmap", mock.Mock(spec=["mmap"], mmap=cpu_network.mmap.mmap)
    ),
    "all images together": lambda: mock.patch.object(cpu_network, "MAP_ELEMENTS", 2**40),
    "images one by one": lambda: mock.patch.object(cpu_network, "MAP_ELEMENTS", 0),
    "no tile registers": lambda: compiled_with("-mno-amx-int8"),
    "all pixels in one block": lambda: mock.patch.object(cpu_network, "CACHE_BYTES", 2**40),
}


@contextlib.contextmanager
def compiled_with(flag: str) -> Iterator[None]:
    cpu_network.library.cache_clear()
    with mock.patch.object(compiler, "FLAGS", (*compiler.FLAGS, flag)):
        yield
    cpu_network.library.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="res2net50_26w_4s")
    args = parser.parse_args()
    torch.set_num_threads(2)
    model = fold_batch_norm(timm.create_model(args.model).eval())
    print(f"res2net-zoo {res2net_zoo.__version__}; speed of each variant relative to the unmodified steps")
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        smooth = F.interpolate(torch.randn(8, 3, 14, 14), size=224, mode="bilinear")
        for batch in (1, 16):
            images = torch.randn(batch, 3, 224, 224)
            calls = []
            for variant in VARIANTS.values():
                with variant():
                    network = Network(model, dtype, calibration=smooth if dtype == torch.int8 else None)
                    network(images)  # compiles the steps with the current library
                    calls.append(bind(network, images, cpu_network.library()))
            times = by_turns(calls, args.rounds, seconds=0.1)
            median = [statistics.median(seconds for turn in turns for seconds in turn) for turns in times]
            for name, taken in zip(VARIANTS, median, strict=True):
                print(f"{dtype}, batch {batch}: {name}: {median[0] / taken:.3f}", flush=True)


def bind(network: Network, images: torch.Tensor, library: object):
    def call() -> None:
        with mock.patch.object(cpu_network, "library", lambda: library):
            network(images)

    return call


if __name__ == "__main__":
    main()
