"""What `scripts/benchmark.py` makes of its timings: medians, ratios, the table, the verdicts and the picture."""

import math
import platform
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo import catalog
from res2net_zoo.analysis.ablate import RESNET50 as PAPERS_RESNET50
from res2net_zoo.analysis.contenders import OURS, PLAIN, PRODUCT, RESNET50, TIMM, Contender, Setting
from res2net_zoo.inference.optimization import processor
from res2net_zoo.utils.markdown import markdown_table

if TYPE_CHECKING:
    from accelerate import Accelerator
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path as PlotPath
    from matplotlib.transforms import Bbox

LIBRARIES = ("res2net-zoo", "torch", "timm", "openvino", "onnxruntime")
# What a network's speed depends on; the first of them all have it.
INSTRUCTIONS = r"avx2|fma|f16c|avx512f|avx512_?(vnni|bf16|fp16)|avx_vnni|amx_\w+|asimd|asimdhp|asimddp|bf16|i8mm|sve2?"


@dataclass
class Result:
    """What was measured of a contender in a setting.

    Attributes:
        setting: What was computed.
        contender: Whose model, and what ran it.
        rounds: Seconds of every call, by round.
        macs: Multiply-accumulates of a call.
        parameters: Number of parameters.
        error: Largest difference of its logits from the model's own in float32, relative to the largest.
        memory_mb: Megabytes that it takes, as `contenders.peak_memory` measures them; None if they were not measured.
        published_top1: Percent published of the model's weights, if any.
    """

    setting: Setting
    contender: Contender
    rounds: list[list[float]]
    macs: int
    parameters: int = 0
    error: float = 0.0
    memory_mb: float | None = None
    published_top1: float | None = None
    quartiles: tuple[float, float, float] = field(init=False)

    def __post_init__(self) -> None:
        self.quartiles = quartiles(list(chain(*self.rounds)))

    @property
    def seconds(self) -> float:
        """Median of all calls."""
        return self.quartiles[1]

    @property
    def images_per_second(self) -> float:
        """Images a second, by the median."""
        return self.setting.batch_size / self.seconds

    @property
    def macs_per_second(self) -> float:
        """Multiply-accumulates a second, by the median."""
        return self.macs / self.seconds


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another contender one is.

    Attributes:
        than: The other.
        ratio: Of the medians of all calls.
        low: Lower quartile of the rounds' own ratios.
        high: Upper quartile of them.
    """

    than: str
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(ours: Result, theirs: Result) -> Ratio:
    """Return how many times as fast one result is as another of the same rounds.

    What disturbs the machine for longer than a turn hits both alike, so the quartiles are those of
    the rounds' own ratios.
    """
    pairs = zip(ours.rounds, theirs.rounds, strict=True)
    low, _, high = quartiles([statistics.median(b) / statistics.median(a) for a, b in pairs])
    return Ratio(str(theirs.contender), theirs.seconds / ours.seconds, low, high)


def fastest(results: Sequence[Result], *who: str) -> Result | None:
    """Return the fastest result of some, if there is one of them."""
    return min((r for r in results if r.contender.who in who), key=lambda r: r.seconds, default=None)


def peak(results: Sequence[Result]) -> float | None:
    """Return the multiply-accumulates a second of the fastest matrix product, if one was timed."""
    product = fastest(results, PRODUCT)
    return product.macs_per_second if product else None


def verdicts(results: Sequence[Result]) -> Iterator[Ratio]:
    """Yield how many times as fast the fastest of ours is as the fastest peer and the fastest ResNet-50."""
    if ours := fastest(results, OURS):
        for who in ((TIMM, PLAIN), (RESNET50,)):
            if theirs := fastest(results, *who):
                yield ratio(ours, theirs)


def verdict_lines(results: Sequence[Result]) -> Iterator[str]:
    """Yield the verdicts on a setting in words."""
    ours = fastest(results, OURS)
    for against in verdicts(results):
        assert ours is not None
        kind = "ResNet-50" if against.than.startswith(RESNET50) else "peer"
        yield (
            f"{ours.setting}: {ours.contender} is {against.ratio:.2f} times as fast as the best {kind}, {against.than} "
            f"(half of the rounds: {against.low:.2f} to {against.high:.2f})"
        )


def table(results: Sequence[Result]) -> str:
    """Return the results of a setting as a table, the fastest of each first."""
    top, ours = peak(results), fastest(results, OURS)
    header = ("contender", "ms", "quartiles", "images/s", "GMACs/s", "of the peak", "memory (MB)", "ours against it")
    rows = []
    for r in sorted(results, key=lambda r: (r.contender.who == PRODUCT, r.seconds)):
        low, middle, high = (1000 * value for value in r.quartiles)
        row = [str(r.contender), f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        row += ["-" if r.contender.who == PRODUCT else f"{r.images_per_second:.1f}"]
        row += [f"{r.macs_per_second / 1e9:.1f}", f"{100 * r.macs_per_second / top:.0f} %" if top else "-"]
        row += ["-" if r.memory_mb is None else f"{r.memory_mb:.0f}"]
        row += ["-" if ours is None or r is ours or r.contender.who == PRODUCT else str(ratio(ours, r))]
        rows.append(row)
    return markdown_table(header, rows)


def as_json(results: Sequence[Result], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a setting as the objects of results.json."""
    top, ours = peak(results), fastest(results, OURS)
    rows = []
    for r in results:
        low, middle, high = (1000 * value for value in r.quartiles)
        rows.append(
            {
                **asdict(r.setting),
                "contender": str(r.contender),
                "who": r.contender.who,
                "backend": r.contender.how,
                "median_ms": middle,
                "lower_quartile_ms": low,
                "upper_quartile_ms": high,
                "calls": sum(map(len, r.rounds)),
                "rounds_ms": [1000 * statistics.median(turn) for turn in r.rounds],
                "images_per_second": None if r.contender.who == PRODUCT else r.images_per_second,
                "macs": r.macs,
                "gmacs_per_second": r.macs_per_second / 1e9,
                "share_of_peak": r.macs_per_second / top if top else None,
                "parameters": r.parameters,
                "memory_mb": r.memory_mb,
                "error": r.error,
                "published_top1": r.published_top1,
                "faster_than": [asdict(v) for v in verdicts(results)] if r is ours else [],
                "machine": dict(machine),
            }
        )
    return rows


def machine(accelerator: "Accelerator") -> dict[str, Any]:
    """Return what the benchmark runs on: hardware, cores, threads, instruction sets and versions."""
    import torch

    from res2net_zoo.training.report import hardware
    from res2net_zoo.utils.processes import share_of_cores

    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # only Linux has it
        flags = None
    return {
        "hardware": hardware(accelerator),
        "processor": processor(),
        "cores": share_of_cores(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [flag for flag in flags[1].split() if re.fullmatch(INSTRUCTIONS, flag)] if flags else [],
        "system": platform.system(),
        "versions": {name: version(name) for name in LIBRARIES if find_spec(name.replace("-", "_"))},
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """Return what the benchmark runs on in words."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    sets = f" with {', '.join(facts['instruction_sets'])}" if facts["instruction_sets"] else ""
    return f"{facts['processor']}, {facts['cores']} cores{sets}; {facts['hardware']}; {versions}"


def published_top1(name: str) -> float | None:
    """Return the top-1 published first for a model's weights on ImageNet, those of its default tag for a bare name."""
    checkpoint = catalog.load().checkpoint(name)
    accuracies = checkpoint.accuracies if checkpoint else ()
    return next((a.top1 for a in accuracies if a.dataset == "imagenet-1k"), None)


def family() -> list[str]:
    """Return every architecture whose default weights have a published accuracy on ImageNet."""
    return [name for name in catalog.load().architectures if published_top1(name) is not None]


def panels(results: Sequence[Result]) -> list[list[Result]]:
    """Return the panels of the picture: of each batch size and precision, the fastest of ours of each model."""
    found: dict[tuple[str, int], dict[str, list[Result]]] = {}
    for r in results:
        if r.setting.mode == "infer" and r.contender.who == OURS and r.published_top1 is not None:
            panel = found.setdefault((r.setting.precision, r.setting.batch_size), {})
            panel.setdefault(r.setting.model, []).append(r)
    return [[min(rows, key=lambda r: r.seconds) for rows in panel.values()] for panel in found.values()]


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw accuracy over images a second, a panel for each batch size and precision.

    Args:
        results: Of all settings.
        path: Picture to write.
    """
    picture = figure(results)
    picture.savefig(path, dpi=picture.dpi)  # at another resolution the names would have another width


def figure(results: Sequence[Result]) -> "Figure":
    """Return the figure of `draw`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    chosen = panels(results)
    figure = Figure(figsize=(6.8 * len(chosen) + 1.6, 5.6), dpi=150, layout="constrained")
    grid = figure.subplots(1, len(chosen), squeeze=False)[0]
    tags = list(dict.fromkeys(_tag(r) for panel in chosen for r in panel))
    named: list[list[tuple[float, float, str]]] = []
    for axis, panel in zip(grid, chosen, strict=True):
        points = [(r.images_per_second, r.published_top1 or 0, r.setting.model.partition(".")[0]) for r in panel]
        for i, tag in enumerate(tags):
            own = [point for r, point in zip(panel, points, strict=True) if _tag(r) == tag]
            axis.plot([p[0] for p in own], [p[1] for p in own], "os^DvPX"[i % 7], markersize=6, label=tag)
        setting = panel[0].setting
        alike = (setting.mode, setting.precision, setting.batch_size)
        same = [r for r in results if (r.setting.mode, r.setting.precision, r.setting.batch_size) == alike]
        if other := fastest(same, RESNET50):
            points.append((other.images_per_second, 100 - float(PAPERS_RESNET50.top1_error), "resnet50"))
            axis.plot(*points[-1][:2], "*", color="black", markersize=11, label="ResNet-50 of the paper")
        named.append(points)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.2, y=0.12)
        axis.set_xlabel("images a second")
        many = f"{setting.batch_size} image{'s' * (setting.batch_size > 1)}"
        axis.set_title(f"{many} at a time, {setting.precision}")
        axis.grid(alpha=0.3)
    grid[0].set_ylabel("published top-1 on ImageNet (%)")
    legend = {label: handle for axis in grid for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(legend.values()), list(legend), title="weights", fontsize=8, loc="outside right center")
    figure.draw_without_rendering()  # which puts the axes where they stay
    for axis, points in zip(grid, named, strict=True):
        _name(figure, axis, points)
    return figure


def _tag(result: Result) -> str:
    """Return which weights a model's accuracy is of."""
    checkpoint = catalog.load().checkpoint(result.setting.model)
    return checkpoint.tag if checkpoint else ""


@dataclass
class _Label:
    """A point's name: the box of its text, and the line that leads from the point to a name that is not beside it.

    Attributes:
        point: The point's centre (x, y) in pixels.
        size: Width and height of the text in pixels.
        dot: Pixels of a typographic point.
        place: Left and bottom of the text in typographic points from the centre.
    """

    point: tuple[float, float]
    size: tuple[float, float]
    dot: float
    place: tuple[float, float] = (6, 6)

    @property
    def box(self) -> "Bbox":
        from matplotlib.transforms import Bbox

        (x, y), (left, bottom) = self.point, self.place
        return Bbox.from_bounds(x + left * self.dot, y + bottom * self.dot, *self.size)

    @property
    def end(self) -> tuple[float, float]:
        """The place on the text that is nearest to the point, in pixels."""
        (x, y), box = self.point, self.box
        return min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)

    @property
    def line(self) -> "PlotPath | None":
        from matplotlib.path import Path as PlotPath

        far = math.dist(self.point, self.end) > 8 * self.dot
        return PlotPath([self.point, self.end]) if far else None

    def places(self) -> Iterator[tuple[float, float]]:
        """Yield the places for the text, the nearest first."""
        width, height = (length / self.dot for length in self.size)
        for far in (6, 10, 15, 20, 26, 34, 44, 56):
            for left in (far, -far - width, -width / 2):
                for bottom in (-height / 2, far, -far - height):
                    if (left, bottom) != (-width / 2, -height / 2):
                        yield left, bottom

    def cost(self, taken: "Sequence[Bbox]", lines: "Sequence[PlotPath]", frame: "Bbox") -> float:
        """Return the area that covers others, in square pixels, with penalties for lines and for leaving the axes.

        Args:
            taken: Boxes of the other points and names.
            lines: Lines of the other names.
            frame: The axes.
        """
        box, line = self.box.padded(2 * self.dot), self.line
        covered = 1000.0 * (frame.count_contains(box.corners()) < 4)
        covered += sum(_overlap(box, other) for other in taken)
        covered += 1000 * sum(other.intersects_bbox(box, filled=False) for other in lines)
        if line is not None:
            covered += 10 + 1000 * sum(line.intersects_bbox(other, filled=False) for other in taken)
            covered += 1000 * sum(line.intersects_path(other, filled=False) for other in lines)
        return covered

    def move(self, others: "Sequence[_Label]", frame: "Bbox") -> None:
        """Move the name to the nearest of the places where it covers least."""
        from matplotlib.transforms import Bbox

        points = [Bbox([other.point, other.point]).padded(5 * self.dot) for other in others]
        taken = [*points, *(other.box for other in others)]
        lines = [line for other in others if (line := other.line) is not None]
        least = math.inf
        for place in self.places():
            moved = replace(self, place=place)
            if (cost := moved.cost(taken, lines, frame)) < least:
                least, self.place = cost, place
            if cost == 0:
                break


def _overlap(a: "Bbox", b: "Bbox") -> float:
    return max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))


def _name(figure: "Figure", axis: "Axes", points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's name beside it, where neither it nor its line covers a point, a name or another line."""
    dot = figure.dpi / 72
    texts = [
        axis.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=7.5, in_layout=False)
        for x, y, name in points
    ]
    sizes = [text.get_window_extent() for text in texts]
    centres = axis.transData.transform([point[:2] for point in points])
    labels = [
        _Label((x, y), (size.width, size.height), dot) for (x, y), size in zip(centres.tolist(), sizes, strict=True)
    ]
    frame = axis.get_window_extent()
    for _ in range(3):  # a name that is placed later may make room for an earlier one
        for i, label in enumerate(labels):
            label.move([*labels[:i], *labels[i + 1 :]], frame)
    for text, label in zip(texts, labels, strict=True):
        text.set_position(label.place)
        if label.line is not None:
            (x, y), (end_x, end_y) = label.point, label.end
            offset = (end_x - x) / dot, (end_y - y) / dot
            arrow = dict(arrowstyle="-", color="gray", linewidth=0.6, shrinkA=0, shrinkB=3)
            axis.annotate("", text.xy, offset, textcoords="offset points", arrowprops=arrow, in_layout=False, zorder=1)
