"""Compare speed and memory of models with timm's implementations and ResNet-50.

Usage: res2net-zoo benchmark [--model NAME ...] [--batch-size N ...] [--precision P ...] [--output FILE]

NAME is a model name as for timm.create_model, or `all` for every model with a published accuracy on ImageNet. Weights
are random, which does not change the speed. Each combination of model, mode, precision and batch size is a setting. In
each round of a setting, all contenders are timed in turn for some seconds, as well as a matrix product, which measures
the peak of the machine. The backends of `optimize` are compared again, and its cached choices for these settings are
replaced. docs/benchmark.md describes the method.

Examples:
  res2net-zoo benchmark
  res2net-zoo benchmark --model res2net50_26w_4s res2net101d --batch-size 1 8 --precision float32 bfloat16
  res2net-zoo benchmark --model all --figure family.png --output results.json

Exit codes: 0 done; 1 one of our models could not be measured; 2 bad input.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import BACKENDS, INT8, PRECISIONS
from res2net_zoo.utils.command_line import within

if TYPE_CHECKING:
    from res2net_zoo.analysis.benchmark import Result
    from res2net_zoo.analysis.contenders import Setting

PEERS = ("eager", "inductor", "cudagraphs", "onnxruntime", "openvino")
AGAINST = ("timm", "resnet50")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_subject(parser.add_argument_group("what to measure").add_argument)
    one = within(int, 1)
    add = parser.add_argument_group("how").add_argument
    add("--rounds", type=one, default=10, help="measurements of each, after one warm-up (default: %(default)s)")
    add(
        "--seconds", type=within(float, 0), default=1.0, help="minimum duration of a measurement (default: %(default)s)"
    )
    add("--pause", type=within(float, 0), default=0.05, help="seconds between measurements (default: %(default)s)")
    add("--device", help="device, cpu or cuda (default: a GPU if there is one)")
    add("--threads", type=one, help="CPU threads per process (default: cores divided by processes)")
    add("--matrix", type=within(int, 64), help="rows of the matrices (default: 2048; 8192 on a GPU)")
    add("--no-memory", action="store_true", help="do not measure memory, which starts a process for each contender")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, help="write the results as JSON, after each setting")
    add("--figure", type=Path, help="plot published accuracy over images per second")
    args = parser.parse_args(argv)
    if len(args.peers) > 1 and {"all", "none"} & set(args.peers):
        parser.error("--peers takes all, none, or names")
    if "int8" in args.precision and "train" in args.mode:
        parser.error("--precision int8 is for inference; remove --mode train")
    if args.figure and "infer" not in args.mode:
        parser.error("--figure draws inference; add --mode infer")
    if args.figure and args.output and args.figure.resolve() == args.output.resolve():
        parser.error(f"--output and --figure are both {args.output}; name two files")
    return args


def add_subject(add: Callable[..., object]) -> None:
    """Add options of models, settings, backends and baselines; each takes a list."""

    def choose(option: str, choices: Sequence[str], default: Sequence[str], about: str) -> None:
        add(option, nargs="+", choices=choices, default=list(default), help=f"{about} (default: %(default)s)")

    add("--model", nargs="+", default=["res2net50_26w_4s"], help="models, or `all` (default: %(default)s)")
    add("--batch-size", nargs="+", type=within(int, 1), default=[1], help="images per batch (default: %(default)s)")
    choose("--precision", (*PRECISIONS, INT8), ["float32"], "precisions of the model")
    choose("--mode", ("infer", "train"), ["infer"], "inference or a whole training step")
    add("--img-size", type=within(int, 8), help="height and width of the images in pixels (default: the model's own)")
    ours = [name for name in BACKENDS if name != "torch"]  # plain PyTorch is a baseline
    choose("--backend", ours, ["auto"], "backends of our models in inference")
    choose("--peers", (*PEERS, "all", "none"), ["all"], "backends of the baselines")
    choose("--against", AGAINST, AGAINST, "baselines")


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from itertools import product

    from res2net_zoo.analysis import benchmark
    from res2net_zoo.analysis.ablate import find_device
    from res2net_zoo.analysis.contenders import OURS, Setting
    from res2net_zoo.cli.results import ResultsFile
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_writable_file, write_atomically
    from res2net_zoo.utils.processes import start_processes

    device = find_device(args.device).type if args.device else None
    accelerator = start_processes(args.threads, cpu=device == "cpu")
    if device not in (None, accelerator.device.type):
        raise InputError(f"Accelerate uses {accelerator.device.type} here, not {device}", "device")
    if accelerator.num_processes > 1:
        raise InputError("several processes would disturb each other's timings; start it with python")
    for path in filter(None, (args.output, args.figure)):
        check_writable_file(path)
    names = benchmark.family() if args.model == ["all"] else args.model
    sizes = {name: input_size(name, args.img_size) for name in names}
    if args.figure:
        check_figure(args.figure, names)

    machine = benchmark.machine(accelerator)
    print(f"{benchmark.machine_line(machine)}\n", flush=True)
    exit_code = 0
    results: list[benchmark.Result] = []
    objects: list[dict] = []
    lines: list[str] = []
    file = ResultsFile(args.output)
    for name, mode, precision, batch_size in product(names, args.mode, args.precision, args.batch_size):
        setting = Setting(
            name, batch_size, precision, mode, sizes[name],
            threads=machine["threads"], device=accelerator.device.type,
            matrix=args.matrix or (2048 if accelerator.device.type == "cpu" else 8192),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            found = measure(setting, args, Path(folder))
        if not any(result.contender.who == OURS for result in found):
            exit_code = 1
        results += found
        objects.extend(benchmark.as_json(found, machine))
        lines += benchmark.verdict_lines(found)
        print(f"{setting}\n\n{benchmark.table(found)}\n", flush=True)
        file.write(objects)
    print("\n".join(lines), flush=True)
    file.check("printed above")
    if args.figure and benchmark.panels(results):
        write_atomically(args.figure, lambda path: benchmark.draw(results, path))
        print(f"figure: {args.figure}")
    if args.output:
        print(f"as JSON: {args.output}")
    return exit_code


def check_figure(path: Path, names: Sequence[str]) -> None:
    """Check that a figure can be drawn, before starting measurements."""
    from res2net_zoo.analysis.ablate import check_picture
    from res2net_zoo.analysis.benchmark import published_top1
    from res2net_zoo.utils.errors import InputError

    check_picture(path)
    if not any(map(published_top1, names)):
        raise InputError(f"--figure needs published accuracies; none is known for {', '.join(names)}")


def input_size(name: str, img_size: int | None) -> tuple[int, int, int]:
    """Return channels, height and width of a model's images.

    Raises:
        InputError: The model does not exist, or has no classifier.
    """
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.weights.pretrained import create_model

    model: Any = create_model(name, pretrained=False)
    if not model.num_classes:
        raise InputError(f"{name} has no classifier to measure")
    channels, height, width = model.pretrained_cfg["input_size"]
    return channels, img_size or height, img_size or width


def measure(setting: "Setting", args: argparse.Namespace, folder: Path) -> "list[Result]":
    """Build the contenders of a setting, time them interleaved, and measure the memory of each.

    Args:
        setting: The setting.
        args: The command line.
        folder: An empty folder for temporary files.
    """
    import gc

    import torch

    from res2net_zoo.analysis.benchmark import Result, published_top1
    from res2net_zoo.analysis.contenders import OURS, PRODUCT, Built, Skipped, build, contenders, cost, peak_memory
    from res2net_zoo.utils.console import printable, progress_bar
    from res2net_zoo.utils.timing import by_turns

    peers = {"all": PEERS, "none": ()}.get(args.peers[0], args.peers)
    ready: dict[str, Built] = {}
    with progress_bar(None, contenders(setting, args.backend, peers, args.against), unit="contender") as bar:
        for contender in bar:
            show_step(bar, f"building {contender}" + ", a minute or more" * (contender.how == "inductor"))
            try:
                built = build(contender, setting, folder)
                ready[str(built.contender)] = built
            except Skipped as error:
                bar.write(printable(f"{setting}: skipped: {error}"), file=sys.stderr)

    gc.collect()
    calls = [built.call for built in ready.values()]
    with progress_bar(None, total=len(calls) * (args.rounds + 1), desc="timing", unit="turn") as bar:
        times = by_turns(calls, args.rounds, args.seconds, args.pause, bar.update)

    results = []
    with progress_bar(None, zip(ready.values(), times, strict=True), total=len(ready), unit="contender") as bar:
        for built, rounds in bar:
            show_step(bar, f"memory of {built.contender}")
            result = Result(setting, built.contender, rounds, *cost(built.contender, setting), error=built.error)
            if built.contender.who == OURS:
                result.published_top1 = published_top1(setting.model)
            if not args.no_memory and built.contender.who != PRODUCT:
                try:
                    result.memory_mb = peak_memory(built.contender, setting, folder)
                except Skipped as error:
                    bar.write(printable(f"{setting}: memory not measured: {error}"), file=sys.stderr)
            results.append(result)
    torch.compiler.reset()  # it caches compiled code, and recompiles a function only a few times
    return results


def show_step(bar: Any, text: str) -> None:
    """Set a bar's description: displayed immediately on a terminal, with the next update elsewhere."""
    bar.set_description(text, refresh=sys.stderr.isatty())
