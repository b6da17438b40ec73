"""Ablation of scale, width, cardinality and depth: the paper's Tables 3 and 4 and Figure 5.

Each model is built from its dimensions. Its parameters and multiply-accumulates are counted, its receptive field is
computed, and its latency is measured on this machine.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from res2net_zoo import catalog
from res2net_zoo.utils.console import progress_bar
from res2net_zoo.utils.errors import InputError, first_line
from res2net_zoo.utils.markdown import markdown_table

# The first row of Table 3, a model that is not in the catalogue.
RESNET50 = catalog.Printed(gmacs="4.2", runtime_ms="149", top1_error="23.85", source="paper (TPAMI 2021) Table 3")
TABLE3 = ("48w_2s", "26w_4s", "14w_8s", "26w_6s", "26w_8s", "18w_4s")
TABLE4 = (
    "resnext29_8c_64w",
    "resnext29_16c_64w",
    "res2next29_6c_24w_4s",
    "res2next29_8c_25w_4s",
    "res2next29_6c_24w_6s",
    "seres2next29_6c_24w_4s",
    "seres2next29_8c_25w_4s",
    "seres2next29_6c_24w_6s",
)
# Figure 5: varies one dimension at a time from 29 layers, 6 groups and scale 1, up to four to six times the
# parameters. Width is an addition; the paper omits it as less effective than cardinality.
BASE = dict(depth=29, cardinality=6, width=24, scale=1)
FIGURE5: dict[str, tuple[int, ...]] = dict(
    scale=(2, 3, 4, 5, 6),
    cardinality=(12, 18, 24, 30, 36),
    depth=(56, 83, 110, 137, 164),
    width=(36, 48, 60, 72),
)
IMAGENET_LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 12, 48, 3)}
SECTIONS = {"table3": "Table 3 (ImageNet)", "table4": "Table 4 (CIFAR-100)", "figure5": "Figure 5", "grid": "Grid"}
NEEDS_MATPLOTLIB = "drawing needs matplotlib; pip install 'res2net-zoo[train]'"
PAPER = ("table3", "table4", "figure5")


@dataclass
class Point:
    """One model of an ablation.

    Attributes:
        name: Name in the table.
        build: Creates the model; takes no arguments.
        input_size: Height and width of its images.
        series: Line of the figure; a point of the series `base` is on all lines.
        printed: Values printed in the paper, by column.
        parameters: Number of parameters.
        macs: Multiply-accumulates per image.
        receptive_field: Height and width of the receptive field of the last features, in pixels.
        latency_ms: Median time of one batch in milliseconds, or None if it was not measured.
    """

    name: str
    build: Callable[[], Any]
    input_size: int
    series: str = ""
    printed: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    macs: int = 0
    receptive_field: int = 0
    latency_ms: float | None = None


def check_picture(picture: Path) -> None:
    """Check the suffix of a picture, and that matplotlib is installed, before minutes of measuring.

    Raises:
        InputError: The suffix is unsupported, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(NEEDS_MATPLOTLIB) from error
    formats = Figure().canvas.get_supported_filetypes()
    if picture.suffix.removeprefix(".") not in formats:
        raise InputError(f"{picture}: the name of a figure must end in .{', .'.join(sorted(formats))}", "figure")


def paper(sections: Sequence[str]) -> dict[str, list[Point]]:
    """Return the paper's models, by table or figure."""
    made = {"table3": of_table3, "table4": of_table4, "figure5": of_figure5}
    return {name: list(made[name]()) for name in PAPER if name in sections}


def of_table3() -> Iterator[Point]:
    """Yield ResNet-50 and the Res2Nets of Table 3."""
    import timm

    columns = {"GMACs": RESNET50.gmacs, "ms": RESNET50.runtime_ms, "top-1 error": RESNET50.top1_error}
    yield Point("resnet50", partial(timm.create_model, "resnet50"), 224, "resnet50", columns)
    for setting in TABLE3:
        name = f"res2net50_{setting}"
        yield Point(name, partial(timm.create_model, name), 224, name, printed(name, "Table 3"))


def of_table4() -> Iterator[Point]:
    """Yield the ResNeXts and Res2NeXts of Table 4."""
    import timm

    for name in TABLE4:
        yield Point(name, partial(timm.create_model, name), 32, name, printed(name, "Table 4"))


def of_figure5() -> Iterator[Point]:
    """Yield the models of Figure 5: the base, then the variations of each dimension."""
    yield of_numbers("cifar", BASE, "base")
    for series, values in FIGURE5.items():
        for value in values:
            yield of_numbers("cifar", {**BASE, series: value}, series)


def longest(grid: dict[str, list[int]]) -> str:
    """Return the dimension with the most values, which a line of the figure runs along."""
    return max(reversed(list(grid)), key=lambda name: len(grid[name]))


def of_grid(grid: dict[str, list[int]], along: str, frame: str) -> Iterator[Point]:
    """Yield all combinations of a grid; dimensions that are not given have the base's value.

    Args:
        grid: Values by dimension.
        along: The dimension along the lines of the figure.
        frame: `cifar` or `imagenet`.

    Raises:
        InputError: No model has these dimensions.
    """
    base = BASE if frame == "cifar" else dict(depth=50, cardinality=1, width=26, scale=4)
    for values in product(*(grid.get(key, [base[key]]) for key in base)):
        numbers = dict(zip(base, values, strict=True))
        others = [f"{key} {numbers[key]}" for key in grid if key != along and len(grid[key]) > 1]
        yield of_numbers(frame, numbers, ", ".join(others) or "all")


def of_numbers(frame: str, numbers: dict[str, int], series: str) -> Point:
    """Return the point of a model with these dimensions.

    Args:
        frame: `cifar` or `imagenet`.
        numbers: Depth, cardinality, width and scale.
        series: Line of the figure.

    Raises:
        InputError: No model has these dimensions.
    """
    from timm.models import ResNet

    from res2net_zoo.models.block import Bottle2neck
    from res2net_zoo.models.cifar import cifar_layers, cifar_name, cifar_res2next

    depth, cardinality, width, scale = numbers.values()
    if frame == "cifar":
        try:
            cifar_layers(depth)
        except ValueError as error:
            raise InputError(str(error), "depth") from error
        build = partial(cifar_res2next, depth, cardinality, width, scale)
        return Point(cifar_name(depth, cardinality, width, scale), build, 32, series)
    if depth not in IMAGENET_LAYERS:
        layers = ", ".join(map(str, IMAGENET_LAYERS))
        raise InputError(f"the ImageNet frame has {layers} layers, not {depth}", "depth")
    args: dict[str, Any] = dict(block=Bottle2neck, block_args=dict(scale=scale))
    args |= dict(layers=IMAGENET_LAYERS[depth], cardinality=cardinality, base_width=width)
    name = cifar_name(depth, cardinality, width, scale)
    return Point(name, partial(ResNet, **args), 224, series)


def printed(name: str, where: str) -> dict[str, str]:
    """Return the values that a table of the paper prints for a model, by column."""
    everything = catalog.load()
    row = next(p for p in everything.architectures[name].printed if where in p.source)
    columns = {"params (M)": row.parameters, "GMACs": row.gmacs, "ms": row.runtime_ms, "top-1 error": row.top1_error}
    checkpoint = everything.checkpoint(name)
    for accuracy in checkpoint.accuracies if checkpoint else ():
        if re.search(rf"Tables?\b.*\b{where[-1]}\b", accuracy.source) and not row.top1_error:
            columns["top-1 error"] = f"{100 - accuracy.top1:.2f}"
    return columns


def count_costs(points: Sequence[Point]) -> None:
    """Set the parameters, multiply-accumulates and receptive field of each point."""
    import torch

    from res2net_zoo.analysis.cost import count, receptive_field

    for point in progress_bar(None, points, desc="counting", unit="model"):
        point.parameters, point.macs = count(point.build, (3, point.input_size, point.input_size))
        with torch.device("meta"):
            point.receptive_field = receptive_field(point.build())


def find_device(name: str) -> Any:
    """Return the device of this name.

    Raises:
        InputError: The device is unavailable.
    """
    import torch

    try:
        device = torch.device(name)
        if not torch.ones(1, device=device).item():  # rejects the meta device, which computes nothing
            raise RuntimeError("it gives wrong results")
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError, ImportError) as error:
        raise InputError(f"device {name}: {first_line(error).partition('. ')[0]}", "device") from error
    return device


def measure_latency(points: Sequence[Point], rounds: int, batch_size: int, device: Any) -> None:
    """Measure the latency of each point, with interleaved timings."""
    import torch

    from res2net_zoo.utils.timing import latencies

    calls = []
    for point in points:
        model = point.build().eval().to(device)
        calls.append(partial(model, torch.randn(batch_size, 3, point.input_size, point.input_size, device=device)))
    with progress_bar(None, total=len(calls) * (rounds + 1), desc="timing", unit="run") as bar:
        for point, milliseconds in zip(points, latencies(calls, rounds, bar.update), strict=True):
            point.latency_ms = milliseconds


def table(points: Sequence[Point], batch_size: int) -> str:
    """Return a table of the points and the paper's values, with latencies also relative to the first."""
    batch = "" if batch_size == 1 else f" for {batch_size}"
    header = ["model", "params (M)", "GMACs", "receptive field (px)", f"ms{batch}", "ratio"]
    columns = [key for key in ("params (M)", "GMACs", "ms", "top-1 error") if any(p.printed.get(key) for p in points)]
    first = points[0].latency_ms
    rows = []
    for p in points:
        timing = [f"{p.latency_ms:.1f}", f"{p.latency_ms / first:.2f}"] if p.latency_ms and first else ["-", "-"]
        row = [p.name, f"{p.parameters / 1e6:.2f}", f"{p.macs / 1e9:.2f}", str(p.receptive_field), *timing]
        rows.append([*row, *(p.printed.get(key) or "-" for key in columns)])
    return markdown_table([*header, *(f"paper: {key}" for key in columns)], rows)


def as_json(sections: dict[str, list[Point]], batch_size: int, device: str) -> str:
    """Return all points as JSON.

    Args:
        sections: The points, by table or figure.
        batch_size: Images per timing.
        device: Device of the timings.
    """
    import torch

    rows: list[dict[str, Any]] = [
        {"section": name, **{key: value for key, value in asdict(point).items() if key != "build"}}
        for name, section in sections.items()
        for point in section
    ]
    machine = {"batch_size": batch_size, "device": device, "torch": torch.__version__}
    return json.dumps([{**row, **machine} for row in rows], indent=2)


def draw(points: Sequence[Point], path: Path, batch_size: int, key: str) -> None:
    """Draw results and costs of the points over their parameters, as Figure 5 does for accuracy.

    Args:
        points: The points, in the order of their lines.
        path: File to write.
        batch_size: Images per timing.
        key: Title of the legend.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[str, Callable[[Point], float | None]]] = [
        ("receptive field (pixels)", lambda p: p.receptive_field),
        ("GMACs per image", lambda p: p.macs / 1e9),
    ]
    if all(p.printed.get("top-1 error") for p in points):
        panels.insert(0, ("top-1 error in the paper (%)", lambda p: float(p.printed["top-1 error"])))
    if all(p.latency_ms is not None for p in points):
        panels.append((f"latency of {batch_size} image{'s' * (batch_size > 1)} (ms)", lambda p: p.latency_ms))
    figure = Figure(figsize=(4.2 * len(panels) + 2.4, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    base = [p for p in points if p.series == "base"]
    series = [name for name in dict.fromkeys(p.series for p in points) if name != "base"]
    for axis, (title, value) in zip(axes, panels, strict=True):
        for i, name in enumerate(series):
            line = base + [p for p in points if p.series == name]
            x, y = [p.parameters / 1e6 for p in line], [value(p) for p in line]
            axis.plot(x, y, marker="os^DvP*X"[i % 8], markersize=5, label=name)
        axis.set_xlabel("parameters (M)")
        axis.set_title(title)
        if "error" not in title:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), title=key or None, fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150)
