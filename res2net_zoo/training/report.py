"""What comes out of a training run beside the weights: metrics, pictures, mistakes, the card."""

import contextlib
import csv
import functools
import glob
import heapq
import importlib.util
import json
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import tomlkit
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import ModelCard
from torch import nn

from res2net_zoo.catalog import Accuracy
from res2net_zoo.evaluation import Counts
from res2net_zoo.training.data import TrainingData
from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import write_atomically
from res2net_zoo.utils.markdown import code_span, markdown, markdown_table
from res2net_zoo.weights.card import CITATION, model_card
from res2net_zoo.weights.model_folder import write_model_folder
from res2net_zoo.weights.provenance import Provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET = 24  # mistakes on the picture


class Mistakes:
    """Collects a model's mistakes during an evaluation: an `Observer` for `evaluate`.

    Args:
        num_classes: Classes of the model.

    Attributes:
        confusion: Number of images (classes, classes) by right class and first answer.
        worst: The most confident mistakes: confidence, right class, answer, image as bytes (C, H, W).
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.worst: list[tuple[float, int, int, torch.Tensor]] = []
        self._heap: list[tuple[float, int, tuple[int, int, torch.Tensor]]] = []

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> None:
        """Take note of a batch; of an image's right answers the first counts."""
        right = targets[:, 0]
        kept = right >= 0
        confidence, answer = logits.softmax(dim=1).max(dim=1)
        pairs = torch.stack([right[kept], answer[kept]]).cpu()
        self.confusion.index_put_(tuple(pairs), torch.ones(pairs.shape[1], dtype=torch.long), accumulate=True)
        for i in ((right != answer) & kept).nonzero().flatten().tolist():
            # The number keeps tuples from being compared any further, and ties in order.
            entry = (confidence[i].item(), -len(self._heap), (int(right[i]), int(answer[i]), images[i].cpu()))
            if len(self._heap) < SHEET:
                heapq.heappush(self._heap, entry)
            elif entry[0] > self._heap[0][0]:
                heapq.heapreplace(self._heap, (entry[0], self._heap[0][1], entry[2]))

    def gather(self, accelerator: Accelerator) -> None:
        """Bring together what all processes have seen; to be called by all of them."""
        self.confusion = accelerator.reduce(self.confusion.to(accelerator.device), "sum").cpu()
        found = [(value, *rest) for value, _, rest in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1]))]
        everyone = gather_object(found)
        self.worst = sorted(everyone, key=lambda entry: -entry[0])[:SHEET]

    def pairs(self, number: int = 10) -> list[tuple[int, int, int, int]]:
        """Return the commonest mistakes: right class, answer, how many images, of how many of that class."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        values, places = wrong.flatten().topk(min(number, wrong.numel()))
        size = len(wrong)
        return [
            (place // size, place % size, value, int(self.confusion[place // size].sum()))
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
            if value
        ]


def write_metrics(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.csv, a row an epoch."""

    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, metrics[0].keys())
            writer.writeheader()
            writer.writerows(metrics)

    write_atomically(folder / "metrics.csv", write)


def _save(folder: Path, name: str, figure: "Figure") -> None:
    write_atomically(folder / name, lambda path: figure.savefig(path, dpi=120))


def draw_learning_curve(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draw loss and accuracy over the epochs as learning_curve.png, of EMA weights beside the others."""
    _save(folder, "learning_curve.png", learning_curve(metrics))


def learning_curve(metrics: Sequence[Mapping[str, Any]]) -> "Figure":
    """Return the figure of loss and accuracy over the epochs, of EMA weights beside the others."""
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
    # From a little below the median: the first epochs would squeeze everything that matters.
    top1 = sorted(m[f"{kind}top1"] for m in metrics)
    accuracy.set(title="Accuracy in evaluation (%)", xlabel="epoch")
    accuracy.set_ylim(max(0, 2 * top1[len(top1) // 2] - 101), 100.5)
    figure.legend(loc="outside lower right", ncols=3, fontsize=9)  # below the axes, where it covers no curve
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return figure


def draw_learning_rate(folder: Path, rates: Sequence[tuple[float, float]]) -> None:
    """Draw the learning rate over the epochs as learning_rate.png.

    Args:
        folder: Folder of the picture.
        rates: Epoch, with a fraction, and the learning rate from there on.
    """
    _save(folder, "learning_rate.png", learning_rate(rates))


def learning_rate(rates: Sequence[tuple[float, float]]) -> "Figure":
    """Return the figure of `draw_learning_rate`."""
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


def draw_mistakes(folder: Path, mistakes: Mistakes, names: Sequence[str]) -> bool:
    """Draw the most confident mistakes as mistakes.png, as the model sees them; False where there is none."""
    from matplotlib.figure import Figure

    if not mistakes.worst:
        (folder / "mistakes.png").unlink(missing_ok=True)
        return False
    columns = min(6, len(mistakes.worst))
    rows = -(-len(mistakes.worst) // columns)
    figure = Figure(figsize=(1.7 * columns, 0.5 + 2.15 * rows), layout="constrained")
    figure.suptitle("The most confident mistakes: answer, confidence, right class", fontsize=9)
    for axes in (grid := figure.subplots(rows, columns, squeeze=False).flatten()):
        axes.axis("off")
    for axes, (confidence, right, answer, image) in zip(grid, mistakes.worst, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0), cmap="gray")
        said, true = (
            textwrap.shorten(printable(names[i]).replace("_", " "), 22, placeholder="...") for i in (answer, right)
        )
        axes.set_title(f"{said} {100 * confidence:.0f}%\n({true})", fontsize=8, parse_math=False)
    _save(folder, "mistakes.png", figure)
    return True


def hardware(accelerator: Accelerator) -> str:
    """Return what a run ran on, in words."""
    number = accelerator.num_processes
    if accelerator.device.type == "cuda":
        return f"{number} x {torch.cuda.get_device_name(accelerator.device)}"
    threads = torch.get_num_threads()
    many = f"{number} processes of {threads} threads" if number > 1 else f"{threads} threads"
    return f"{accelerator.device.type} ({platform.machine()}, {many})"


def mistakes_table(mistakes: Mistakes, names: Sequence[str]) -> str:
    """Return the commonest mistakes as Markdown, or a sentence where there is none."""
    rows = [
        (markdown(names[right]), markdown(names[answer]), number, f"{100 * number / of:.1f}")
        for right, answer, number, of in mistakes.pairs()
    ]
    if not rows:
        return "It makes no mistake there."
    return markdown_table(("right class", "its answer", "images", "% of the class"), rows)


def best_of(metrics: Sequence[Mapping[str, Any]], kinds: Sequence[str] = ("", "ema_")) -> tuple[float, int, str]:
    """Return the best top-1, its epoch (of several, the last) and its kind.

    Args:
        metrics: Of each epoch.
        kinds: Weights to choose among: `` the trained ones, `ema_` their moving average.
    """
    return max((row[f"{kind}top1"], row["epoch"], kind) for row in metrics for kind in kinds if f"{kind}top1" in row)


def anchored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the paths in them made absolute, so that they mean the same in another folder."""

    def anchor(key: str, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        head, colon, tail = value.rpartition("local-dir:")
        if colon or (key == "data" and (Path(value).exists() or glob.has_magic(value))):
            return f"{head}{colon}{os.path.abspath(tail)}"
        return value

    return {key: anchor(key, value) for key, value in settings.items()}


def start_run(run: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run down where --resume finds them, from whatever folder it is asked for."""
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(run, anchored(settings))


def write_recipe(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as recipe.toml."""
    text = f"# Every setting of a run; --recipe takes this file.\n{tomlkit.dumps(settings)}"
    write_atomically(folder / "recipe.toml", lambda path: path.write_text(text))


@contextlib.contextmanager
def plainly(folder: Path) -> Iterator[None]:
    """Have what writes into a model folder say in one line why it cannot.

    Raises:
        InputError: It cannot.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"cannot write {where}: {error.strerror or error}; --resume goes on once it can") from error


def _plainly(write: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(write)
    def wrapped(report: "Report", *args: Any) -> None:
        with plainly(report.folder):
            write(report, *args)

    return wrapped


@dataclass
class Report:
    """What is written of a training run, by its main process.

    Attributes:
        folder: The model folder.
        run: Where the run keeps its state.
        settings: All settings of the run that have a value.
        data: What it is trained and evaluated on.
        config: The pretrained_cfg of the model that comes out.
        origin: Where its weights come from.
        hardware: What it runs on.
        command: What started it.
        metrics: Of each epoch.
        samples: Images that it was evaluated on.
        final: The evaluation of the best model, in float32, at the end.
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

    @_plainly
    def start(self) -> None:
        """Write the settings down where --resume finds them."""
        start_run(self.run, self.settings)

    @_plainly
    def epoch(self, model: nn.Module, average: nn.Module | None) -> None:
        """Write the last epoch's metrics, and each model that is the best so far.

        Args:
            model: The trained model.
            average: That of the averaged weights. With both, the better is in the folder, and the
                best of each kind in the run's.
        """
        epoch = self.metrics[-1]["epoch"]
        both = ("", "ema_")
        for kind, module in zip(both, (model, average), strict=True):
            if module is None:
                continue
            folders: list[tuple[Path, tuple[str, ...]]] = [(self.folder, both)]
            if average is not None:
                folders.append((self.run / ("ema" if kind else "raw"), (kind,)))
            for folder, kinds in folders:
                if best_of(self.metrics, kinds)[1:] == (epoch, kind):
                    write_model_folder(folder, module, self._card(folder, kinds), self.data.names, origin=self.origin)
                    write_recipe(folder, self.settings)
        write_metrics(self.folder, self.metrics)

    @_plainly
    def finish(self, mistakes: Mistakes, rates: Sequence[tuple[float, float]], counts: Counts) -> None:
        """Draw the pictures, and write the card that has them.

        Args:
            mistakes: Those of the best model.
            rates: As for `draw_learning_rate`.
            counts: Its evaluation.
        """
        self.final = counts
        pictures = []
        if importlib.util.find_spec("matplotlib"):
            draw_learning_curve(self.folder, self.metrics)
            draw_learning_rate(self.folder, rates)
            pictures = ["learning_curve.png", "learning_rate.png"]
            pictures += ["mistakes.png"] * draw_mistakes(self.folder, mistakes, self.data.names)
        else:
            print("no pictures: they take matplotlib, pip install -e '.[train]'", file=sys.stderr)
        write_atomically(self.folder / "README.md", self._card(self.folder, ("", "ema_"), mistakes, pictures).save)

    @property
    def check(self) -> str:
        """The command that measures the model again."""
        words = [
            "python",
            "scripts/validate.py",
            "--model",
            f"local-dir:{self.folder}",
            "--data",
            self.settings["data"],
        ]
        words += ["--split", self.data.valid.split]
        if "label_column" in self.settings:
            words += ["--label-column", self.settings["label_column"]]
        words += [f"--{key.replace('_', '-')}" for key in ("streaming", "skip_corrupt") if self.settings[key]]
        return shlex.join([*words, "--check"])

    def _card(
        self,
        folder: Path,
        kinds: Sequence[str],
        mistakes: Mistakes | None = None,
        pictures: Sequence[str] = (),
    ) -> ModelCard:
        name, data, metrics, cfg = folder.resolve().name, self.data, self.metrics, self.config
        top1, epoch, kind = best_of(metrics, kinds)
        row = metrics[epoch - 1]
        top5 = row[f"{kind}top5"]
        if self.final is not None:
            top1, top5 = self.final.percent(self.final.top1), self.final.percent(self.final.top5)
        accuracy = Accuracy(
            dataset=data.valid.name, split=data.valid.split, top1=top1, top5=top5, source="scripts/finetune.py"
        )
        held_out = "/held-out-" in data.valid.split
        classes = ", ".join(map(code_span, data.names[:50])) + ", ..." * (len(data.names) > 50)
        trained = f"{data.num_images:,} images" if data.indices is not None else "a stream of images"
        if (counts := data.used_counts) and min(counts) < max(counts):
            trained += f", {min(counts):,} to {max(counts):,} of each class,"
        held = f", held out of `{data.train.split}`: {self.settings['hold_out']:g} of each class" * held_out
        precision = self.settings.get("mixed_precision", "no")
        measured = f" (measured in {precision})" * (self.final is None and precision != "no")
        speeds = [row["images_per_second"] for row in metrics if row["images_per_second"]]
        average = ", by a moving average of the weights" * bool(kind)
        mode = "L" if cfg["input_size"][0] == 1 else "RGB"
        parts = [
            f"# {markdown(name)}",
            f"{cfg['architecture']} with {len(data.names)} classes, trained from "
            f"{'pretrained' if self.origin.start else 'random'} weights on {code_span(data.train.name)} by the Res2Net "
            "Zoo. Res2Net: Gao et al., TPAMI 2021, arXiv 1904.01169.",
            f"""## Use

In the folder that holds this one:

```python
import timm
import res2net_zoo  # registers the model with timm
from PIL import Image

model = timm.create_model({json.dumps(f"local-dir:{folder.name}")}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("image.jpg").convert("{mode}")).unsqueeze(0))
print(model.pretrained_cfg["label_names"][logits.argmax()])
```""",
            f"## Accuracy\n\nTop-1 {top1:.3f}, top-5 {top5:.3f} percent{measured} on the {self.samples:,} images of "
            f"the split `{data.valid.split}`, which training never saw. This is epoch {epoch} of {len(metrics)}, the "
            f"best on that same split (of several, the last){average}, so expect a little less on new images. "
            "`python scripts/validate.py --check` measures it again.",
            f"## Data\n\nTrained on {trained} of the split `{data.train.split}`; evaluated on {self.samples:,} of "
            f"`{data.valid.split}`{held}. Input: {' x '.join(map(str, cfg['input_size']))}. {len(data.names)} classes: "
            f"{classes}.",
        ]
        if mistakes is not None:
            parts.append(f"## Mistakes\n\nThe commonest, on that split:\n\n{mistakes_table(mistakes, data.names)}")
        if "mistakes.png" in pictures:
            parts.append("The most confident, as the model sees them:\n\n![Mistakes](mistakes.png)")
        versions = f"torch {torch.__version__.split('+')[0]} and timm {timm.__version__}"
        parts += [
            f"## Training\n\nMade by\n\n```\n{printable(self.command)}\n```",
            f"This was {versions} on {self.hardware}: {f'{speeds[-1]:g} images/s, ' if speeds else ''}at most "
            f"{metrics[-1]['peak_memory_mb']:,} MB in a process.",
        ]
        if pictures:
            parts.append("![Learning curve](learning_curve.png)\n\n![Learning rate](learning_rate.png)")
        if self.origin.start or self.origin.teacher:
            parts.append(f"The weights come from: {markdown(str(self.origin))}.")
        settings = [(key, markdown(json.dumps(value, default=str))) for key, value in self.settings.items()]
        table = markdown_table(("setting", "value"), settings)
        parts += [
            f"<details><summary>All settings, as in recipe.toml</summary>\n\n{table}\n\n</details>",
            f"## Citation\n\n{CITATION}\n",
        ]
        from_hub = data.train.name == self.settings["data"] and not Path(data.train.name).exists()
        hub = [data.train.name] if from_hub else []
        return model_card(name, "\n\n".join(parts), self.origin.license, [accuracy], hub, self.origin.base_model)
