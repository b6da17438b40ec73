"""The report of a training run: settings, plots, mistakes, and the best models with their cards."""

import contextlib
import functools
import glob
import heapq
import importlib.util
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from res2net_zoo.evaluation import Counts
from res2net_zoo.training.card import training_card
from res2net_zoo.training.data import TrainingData
from res2net_zoo.training.metrics import best_of, write_metrics
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import write_atomically
from res2net_zoo.weights import bill_of_materials
from res2net_zoo.weights.model_folder import write_model_folder
from res2net_zoo.weights.provenance import Provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET = 24  # mistakes in the picture
MOST_FREQUENT = 10  # kinds of mistakes in the card


class Mistakes:
    """Collects a model's mistakes in an evaluation: an `Observer` for `evaluate`.

    Args:
        num_classes: Classes of the model.

    Attributes:
        confusion: Number of images (classes, classes), by label and prediction.
        worst: The most confident mistakes: confidence, label, prediction, image as bytes (C, H, W).
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.worst: list[tuple[float, int, int, torch.Tensor]] = []
        self._heap: list[tuple[float, int, tuple[int, int, torch.Tensor]]] = []

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> None:
        """Count the mistakes in a batch; if an image has several labels, the first counts."""
        right = targets[:, 0]
        kept = right >= 0
        confidence, answer = logits.softmax(dim=1).max(dim=1)
        pairs = torch.stack([right[kept], answer[kept]]).cpu()
        self.confusion.index_put_(tuple(pairs), torch.ones(pairs.shape[1], dtype=torch.long), accumulate=True)
        for i in ((right != answer) & kept).nonzero().flatten().tolist():
            # The number prevents comparison of the images, and keeps ties in order.
            entry = (confidence[i].item(), -len(self._heap), (int(right[i]), int(answer[i]), images[i].cpu()))
            if len(self._heap) < SHEET:
                heapq.heappush(self._heap, entry)
            elif entry[0] > self._heap[0][0]:
                heapq.heapreplace(self._heap, (entry[0], self._heap[0][1], entry[2]))

    def gather(self, accelerator: Accelerator) -> None:
        """Combine the mistakes of all processes. Each must call it."""
        self.confusion = accelerator.reduce(self.confusion.to(accelerator.device), "sum").cpu()
        found = [(value, *rest) for value, _, rest in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1]))]
        everyone = gather_object(found)
        self.worst = sorted(everyone, key=lambda entry: -entry[0])[:SHEET]

    def pairs(self) -> list[tuple[int, int, int, int]]:
        """Return the most frequent mistakes: label, prediction, number of images, number of images of the label."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        values, places = wrong.flatten().topk(min(MOST_FREQUENT, wrong.numel()))
        size = len(wrong)
        return [
            (place // size, place % size, value, int(self.confusion[place // size].sum()))
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
            if value
        ]


def learning_curve(metrics: Sequence[Mapping[str, Any]]) -> "Figure":
    """Return the figure of loss and accuracy over the epochs, also for EMA weights."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [m["epoch"] for m in metrics]
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    marker = "." if len(epochs) == 1 else ""  # a line through one point is invisible
    loss.plot(epochs, [m["train_loss"] for m in metrics], color="tab:blue", marker=marker)
    loss.set(title="Training loss", xlabel="epoch")
    for prefix, colour, what in (("", "tab:orange", ""), ("ema_", "tab:green", ", EMA")):
        if f"{prefix}top1" in metrics[0]:
            for key, label, style in (("top1", "top-1", "-"), ("top5", "top-5", ":")):
                values = [m[prefix + key] for m in metrics]
                accuracy.plot(epochs, values, style, color=colour, marker=marker, label=label + what)
    top, best, kind = best_of(metrics)
    about = f"best: {top:.2f} in epoch {best}"
    accuracy.plot(best, top, "o", color="tab:green" if kind else "tab:orange", label=about)
    # Start a little below the median, because the first epochs would compress the others.
    top1 = sorted(m[f"{kind}top1"] for m in metrics)
    accuracy.set(title="Accuracy in evaluation (%)", xlabel="epoch")
    accuracy.set_ylim(max(0, 2 * top1[len(top1) // 2] - 101), 100.5)
    figure.legend(loc="outside lower right", ncols=3, fontsize=9)  # below the axes, so that it covers no curve
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return figure


def learning_rate(rates: Sequence[tuple[float, float]]) -> "Figure":
    """Return the figure of the learning rate over the epochs.

    Args:
        rates: Fractional epochs, and the learning rates from there on.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*rates, strict=True), color="tab:blue", drawstyle="steps-post")
    axes.set(title="Learning rate", xlabel="epoch", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    return figure


def mistakes_sheet(mistakes: Mistakes, names: Sequence[str]) -> "Figure":
    """Return the figure of the most confident mistakes, after preprocessing; there must be one."""
    from matplotlib.figure import Figure

    columns = min(6, len(mistakes.worst))
    rows = -(-len(mistakes.worst) // columns)
    figure = Figure(figsize=(max(1.7 * columns, 5), 0.5 + 2.15 * rows), layout="constrained")
    figure.suptitle("The most confident mistakes: prediction, confidence, label", fontsize=9)
    for axes in (grid := figure.subplots(rows, columns, squeeze=False).flatten()):
        axes.axis("off")
    for axes, (confidence, right, answer, image) in zip(grid, mistakes.worst, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0), cmap="gray")
        predicted, label = (
            textwrap.shorten(printable(names[i]).replace("_", " "), 22, placeholder="...") for i in (answer, right)
        )
        axes.set_title(f"{predicted} {100 * confidence:.0f}%\n({label})", fontsize=8, parse_math=False)
    return figure


def hardware(accelerator: Accelerator) -> str:
    """Return a description of the hardware."""
    number = accelerator.num_processes
    if accelerator.device.type == "cuda":
        return f"{number} x {torch.cuda.get_device_name(accelerator.device)}"
    threads = torch.get_num_threads()
    many = f"{number} processes of {threads} threads" if number > 1 else f"{threads} threads"
    return f"{accelerator.device.type} ({platform.machine()}, {many})"


def anchored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with absolute paths, which are valid in any working directory."""

    def anchor(key: str, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        head, colon, tail = value.rpartition("local-dir:")
        if colon or (key == "data" and (Path(value).exists() or glob.has_magic(value))):
            return f"{head}{colon}{os.path.abspath(tail)}"
        return value

    return {key: anchor(key, value) for key, value in settings.items()}


def start_run(run: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run to its folder, so that it can be resumed from any working directory."""
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(run, anchored(settings))


def write_recipe(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as recipe.toml."""
    text = f"# Every setting of a run, as a recipe.\n{tomlkit.dumps(settings)}"
    write_atomically(folder / "recipe.toml", lambda path: path.write_text(text))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Replace errors while writing a model folder by one-line messages.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise InputError(
            f"cannot write {where}: {error.strerror or error}; resume the run once this is possible", "resume"
        ) from error


def _writing(write: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(write)
    def wrapped(report: "Report", *args: Any) -> None:
        with writing(report.folder):
            write(report, *args)

    return wrapped


@dataclass
class Report:
    """Writes the results of a training run, in its main process.

    Attributes:
        folder: The model folder.
        run: Folder of the run's checkpoints and settings.
        settings: All settings of the run that are not None.
        data: The training and evaluation images.
        config: The `pretrained_cfg` of the trained model.
        origin: Provenance of its weights.
        hardware: Description of the hardware.
        command: The command that started it.
        metrics: A row for each epoch.
        samples: Number of evaluation images.
        final: The final evaluation of the best model in float32.
    """

    folder: Path
    run: Path
    settings: dict[str, Any]
    data: TrainingData
    config: dict[str, Any]
    origin: Provenance
    hardware: str
    command: str
    metrics: list[dict[str, Any]]
    samples: int = 0
    final: Counts | None = None

    @_writing
    def start(self) -> None:
        """Write the settings, from which the run can be resumed."""
        start_run(self.run, self.settings)

    @_writing
    def epoch(self, model: nn.Module, average: nn.Module | None) -> None:
        """Write the metrics, and the models that are the best so far.

        Args:
            model: The trained model.
            average: The model with averaged weights, or None. If there are both, the model folder contains the better
                one, and the run folder the best of each kind.
        """
        epoch = self.metrics[-1]["epoch"]
        changed = {self.folder}
        both = ("", "ema_")
        for kind, module in zip(both, (model, average), strict=True):
            if module is None:
                continue
            folders: list[tuple[Path, tuple[str, ...]]] = [(self.folder, both)]
            if average is not None:
                folders.append((self.run / ("ema" if kind else "raw"), (kind,)))
            for folder, kinds in folders:
                if best_of(self.metrics, kinds)[1:] == (epoch, kind):
                    write_model_folder(
                        folder, module, training_card(self, folder, kinds), self.data.names, origin=self.origin
                    )
                    write_recipe(folder, self.settings)
                    changed.add(folder)
        write_metrics(self.folder, self.metrics)
        for folder in changed:
            bill_of_materials.update(folder)

    @_writing
    def finish(self, mistakes: Mistakes, rates: Sequence[tuple[float, float]], counts: Counts) -> None:
        """Draw the plots, and write the card with them.

        Args:
            mistakes: Mistakes of the best model.
            rates: As for `learning_rate`.
            counts: Its evaluation.
        """
        self.final = counts
        pictures: dict[str, Figure] = {}
        if importlib.util.find_spec("matplotlib"):
            pictures["learning_curve.png"] = learning_curve(self.metrics)
            pictures["learning_rate.png"] = learning_rate(rates)
            if mistakes.worst:
                pictures["mistakes.png"] = mistakes_sheet(mistakes, self.data.names)
            else:
                (self.folder / "mistakes.png").unlink(missing_ok=True)
        else:
            print("plots are skipped: they need matplotlib; pip install 'res2net-zoo[train]'", file=sys.stderr)
        for name, figure in pictures.items():
            write_atomically(self.folder / name, functools.partial(figure.savefig, dpi=120))
        card = training_card(self, self.folder, ("", "ema_"), mistakes.pairs(), list(pictures))
        write_atomically(self.folder / "README.md", card.save)
        bill_of_materials.update(self.folder)
