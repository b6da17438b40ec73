"""Compare training steps of the zoo's Res2Net and timm's: speed ratios of interleaved timings. Run by hand.

`python -m tests.models.compare_block [--rounds 15] [--threads 2] [--precision bf16 float32]`

Both are res2net50_26w_4s in channels_last, with the same weights.
A step is forward, loss, backward and SGD; in bf16 forward and loss run under torch.autocast, as
accelerate runs them. A round times one step of each, in an order that changes from round to round;
the ratio is that of the medians. On a shared machine, `--clock cpu --threads 1` measures
the CPU time of this process only.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timm.models.res2net import Bottle2neck as TimmBottle2neck
from timm.models.resnet import ResNet
from torch import nn

from res2net_zoo.kernels.training import accelerate_training
from res2net_zoo.models.block import Bottle2neck
from res2net_zoo.models.res2net import Res2Net

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


MODELS = {"timm": (ResNet, TimmBottle2neck), "zoo": (Res2Net, Bottle2neck)}


def training_step(whose: str, args: argparse.Namespace, precision: str) -> Callable[[], None]:
    """Build a model and return a function that trains it for one step."""
    torch.manual_seed(0)
    block_args = dict(scale=args.scale)
    model_cls, block = MODELS[whose]
    model: nn.Module = model_cls(block=block, layers=(3, 4, 6, 3), base_width=args.base_width, block_args=block_args)
    model = accelerate_training(model.to(memory_format=torch.channels_last).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size).to(memory_format=torch.channels_last)
    targets = torch.randint(0, 1000, (args.batch_size,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--base-width", type=int, default=26)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", nargs="+", choices=("bf16", "float32"), default=["bf16", "float32"])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = CLOCKS[args.clock]
    for precision in args.precision:
        steps = {name: training_step(name, args, precision) for name in MODELS}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(-2, args.rounds):  # the first two warm up
            for name in sorted(steps, reverse=turn % 2 == 1):
                start = clock()
                steps[name]()
                if turn >= 0:
                    times[name].append(clock() - start)
        median = {name: statistics.median(values) for name, values in times.items()}
        least = {name: min(values) for name, values in times.items()}
        print(
            f"{precision}: timm {1000 * median['timm']:.0f} ms, zoo {1000 * median['zoo']:.0f} ms, "
            f"timm / zoo {median['timm'] / median['zoo']:.3f} "
            f"(of the fastest steps {least['timm'] / least['zoo']:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
