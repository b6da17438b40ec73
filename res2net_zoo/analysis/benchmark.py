"""Evaluation of the timings of `scripts/benchmark.py`: medians, ratios, table, verdicts and figure."""

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

LIBRARIES = ("res2net-zoo", "torch", "timm", "openvino", "onnxruntime", "nncf")
# Instruction sets that affect the speed of a network.
INSTRUCTIONS = r"avx2|fma|f16c|avx512f|avx512_?(vnni|bf16|fp16)|avx_vnni|amx_\w+|asimd|asimdhp|asimddp|bf16|i8mm|sve2?"


@dataclass
class Result:
    """Measurements of a contender in a setting.

    Attributes:
        setting: The computation.
        contender: The model and the backend.
        rounds: Seconds of each call, by round.
        macs: Multiply-accumulates per call.
        parameters: Number of parameters.
        error: Maximum difference of its logits from the float32 model's, relative to the largest logit.
        memory_mb: Memory in megabytes, as measured by `contenders.peak_memory`; None if not measured.
        published_top1: Published top-1 of the model's weights in percent, if any.
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
        """Images per second, by the median."""
        return self.setting.batch_size / self.seconds

    @property
    def macs_per_second(self) -> float:
        """Multiply-accumulates per second, by the median."""
        return self.macs / self.seconds


@dataclass(frozen=True)
class Ratio:
    """Speedup of a contender over another.

    Attributes:
        than: The other contender.
        ratio: Ratio of the medians of all calls.
        low: Lower quartile of the ratios per round.
        high: Upper quartile of the ratios per round.
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
    """Return the speedup of one result over another of the same rounds.

    Quartiles are computed over ratios per round, because disturbances that are longer than a round affect both.
    """
    pairs = zip(ours.rounds, theirs.rounds, strict=True)
    low, _, high = quartiles([statistics.median(b) / statistics.median(a) for a, b in pairs])
    return Ratio(str(theirs.contender), theirs.seconds / ours.seconds, low, high)


def fastest(results: Sequence[Result], *who: str) -> Result | None:
    """Return the fastest result of the given contenders, or None."""
    return min((r for r in results if r.contender.who in who), key=lambda r: r.seconds, default=None)


def peak(results: Sequence[Result]) -> float | None:
    """Return the multiply-accumulates per second of the fastest matrix product, or None if none was timed."""
    product = fastest(results, PRODUCT)
    return product.macs_per_second if product else None


def verdicts(results: Sequence[Result]) -> Iterator[Ratio]:
    """Yield the speedups of our fastest backend over the fastest peer and the fastest ResNet-50."""
    if ours := fastest(results, OURS):
        for who in ((TIMM, PLAIN), (RESNET50,)):
            if theirs := fastest(results, *who):
                yield ratio(ours, theirs)


def verdict_lines(results: Sequence[Result]) -> Iterator[str]:
    """Yield the verdicts on a setting as text."""
    ours = fastest(results, OURS)
    for against in verdicts(results):
        assert ours is not None
        kind = "ResNet-50" if against.than.startswith(RESNET50) else "peer"
        yield (
            f"{ours.setting}: {ours.contender} is {against.ratio:.2f} times as fast as the best {kind}, {against.than} "
            f"(half of the rounds: {against.low:.2f} to {against.high:.2f})"
        )


def table(results: Sequence[Result]) -> str:
    """Return the results of a setting as a table, fastest first."""
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
    """Return facts about the machine: hardware, cores, threads, instruction sets and versions."""
    import torch

    from res2net_zoo.training.report import hardware
    from res2net_zoo.utils.processes import share_of_cores

    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
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
    """Return facts about the machine as text."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    sets = f" with {', '.join(facts['instruction_sets'])}" if facts["instruction_sets"] else ""
    return f"{facts['processor']}, {facts['cores']} cores{sets}; {facts['hardware']}; {versions}"


def published_top1(name: str) -> float | None:
    """Return the first published top-1 of a model's weights on ImageNet; names without a tag have default weights."""
    checkpoint = catalog.load().checkpoint(name)
    accuracies = checkpoint.accuracies if checkpoint else ()
    return next((a.top1 for a in accuracies if a.dataset == "imagenet-1k"), None)


def family() -> list[str]:
    """Return all architectures whose default weights have a published accuracy on ImageNet."""
    return [name for name in catalog.load().architectures if published_top1(name) is not None]


def panels(results: Sequence[Result]) -> list[list[Result]]:
    """Return the panels of the figure: our fastest result of each model, by batch size and precision."""
    found: dict[tuple[str, int], dict[str, list[Result]]] = {}
    for r in results:
        if r.setting.mode == "infer" and r.contender.who == OURS and r.published_top1 is not None:
            panel = found.setdefault((r.setting.precision, r.setting.batch_size), {})
            panel.setdefault(r.setting.model, []).append(r)
    return [[min(rows, key=lambda r: r.seconds) for rows in panel.values()] for panel in found.values()]


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw accuracy over images per second, with one panel per batch size and precision.

    Args:
        results: Results of all settings.
        path: File to write.
    """
    picture = figure(results)
    picture.savefig(path, dpi=picture.dpi)  # labels are placed for this resolution


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
        axis.set_xlabel("images per second")
        many = f"{setting.batch_size} image{'s' * (setting.batch_size > 1)}"
        axis.set_title(f"batch of {many}, {setting.precision}")
        axis.grid(alpha=0.3)
    grid[0].set_ylabel("published top-1 on ImageNet (%)")
    legend = {label: handle for axis in grid for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(legend.values()), list(legend), title="weights", fontsize=8, loc="outside right center")
    figure.draw_without_rendering()  # computes the final layout of the axes
    for axis, points in zip(grid, named, strict=True):
        _label_points(figure, axis, points)
    return figure


def _tag(result: Result) -> str:
    """Return the tag of the weights of a model."""
    checkpoint = catalog.load().checkpoint(result.setting.model)
    return checkpoint.tag if checkpoint else ""


@dataclass
class _Label:
    """A point's label: the box of its text, and a line from the point to a distant label.

    Attributes:
        point: Centre (x, y) of the point in pixels.
        size: Width and height of the text in pixels.
        dot: Pixels per typographic point.
        place: Left and bottom of the text, relative to the centre, in typographic points.
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
        """The position on the text that is nearest to the point, in pixels."""
        (x, y), box = self.point, self.box
        return min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)

    @property
    def line(self) -> "PlotPath | None":
        from matplotlib.path import Path as PlotPath

        far = math.dist(self.point, self.end) > 8 * self.dot
        return PlotPath([self.point, self.end]) if far else None

    def places(self) -> Iterator[tuple[float, float]]:
        """Yield candidate positions of the text, nearest first."""
        width, height = (length / self.dot for length in self.size)
        for far in (6, 10, 15, 20, 26, 34, 44, 56):
            for left in (far, -far - width, -width / 2):
                for bottom in (-height / 2, far, -far - height):
                    if (left, bottom) != (-width / 2, -height / 2):
                        yield left, bottom

    def cost(self, taken: "Sequence[Bbox]", lines: "Sequence[PlotPath]", frame: "Bbox") -> float:
        """Return the overlap with others in square pixels, plus penalties for crossing lines and leaving the axes.

        Args:
            taken: Boxes of the other points and labels.
            lines: Lines of the other labels.
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
        """Move the label to the nearest position of least cost."""
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


def _label_points(figure: "Figure", axis: "Axes", points: Sequence[tuple[float, float, str]]) -> None:
    """Label the points, so that labels and their lines overlap as little as possible."""
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
    for _ in range(3):  # a later move can make room for an earlier label
        for i, label in enumerate(labels):
            label.move([*labels[:i], *labels[i + 1 :]], frame)
    for text, label in zip(texts, labels, strict=True):
        text.set_position(label.place)
        if label.line is not None:
            (x, y), (end_x, end_y) = label.point, label.end
            offset = (end_x - x) / dot, (end_y - y) / dot
            arrow = dict(arrowstyle="-", color="gray", linewidth=0.6, shrinkA=0, shrinkB=3)
            axis.annotate("", text.xy, offset, textcoords="offset points", arrowprops=arrow, in_layout=False, zorder=1)
