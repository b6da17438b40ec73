"""Export of a model to a quantized file, together with its measured loss of accuracy."""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from res2net_zoo.data.labels import Classes, match_classes, recognize
from res2net_zoo.data.sources import labels_of
from res2net_zoo.evaluation import TOPK, collate, count_batch
from res2net_zoo.inference.calibration import Selection, load_images
from res2net_zoo.inference.export import (
    EXPORT,
    NEEDS,
    OPSET,
    SEVERAL,
    CheckError,
    Runner,
    card_path,
    check_file,
    check_output,
    compare,
    expected_output,
    output_name,
    refuse,
    replaced_together,
    run_onnx,
    run_openvino,
    save_ir,
    set_metadata,
    to_onnx,
    to_openvino,
)
from res2net_zoo.inference.exported_file import ExportedFile, read
from res2net_zoo.inference.optimization import processor
from res2net_zoo.inference.quantization import (
    OTHER_NORMS,
    check_calibration,
    has_int8_instructions,
    quantize_onnx,
    quantize_openvino,
)
from res2net_zoo.inference.quantized_card import LABELS, quantized_card
from res2net_zoo.utils.console import progress_bar, warn
from res2net_zoo.utils.errors import InputError, first_line
from res2net_zoo.utils.packages import require
from res2net_zoo.utils.shutdown import ignore_job_signals

MAX_LOSS = 1.0  # percentage points of top-1
CHECKED = 16  # images on which the float32 graph is compared with PyTorch
BATCH_SIZE = 32  # images per batch of the measurement
FEW = 100  # held-out images; on fewer, one image is more than a point
REPRODUCED = 5e-2  # permitted difference of the file's logits from the measured ones, relative to the largest
METHODS = {
    "onnx": "post-training quantization by ONNX Runtime (QDQ), BatchNorm folded: weights in int8, symmetric, "
    "one scale per channel; activations in uint8, one scale per tensor",
    "openvino": "post-training quantization by NNCF (FakeQuantize), BatchNorm folded: weights in int8, symmetric, "
    "one scale per channel; activations in 8 bits, one scale per tensor",
}
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
LIBRARIES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino", "nncf")}


class Measured(NamedTuple):
    """Numbers of held-out images, counted in the runtime.

    Attributes:
        images: All.
        correct: Those whose label is the first prediction, and among the first five, by precision.
        same_top1: Those with the same first prediction in both precisions.
    """

    images: int
    correct: dict[str, tuple[int, int]]
    same_top1: int

    def percent(self, precision: str, k: int) -> float:
        """Return the top-1 (k = 0) or top-5 (k = 1) accuracy in percent."""
        return 100 * self.correct[precision][k] / self.images

    def loss(self, k: int = 0) -> float:
        """Return the loss of quantization, in percentage points of top-1 (k = 0) or top-5 (k = 1)."""
        return 100 * (self.correct["float32"][k] - self.correct["int8"][k]) / self.images


@dataclass(frozen=True)
class QuantizedExport:
    """A quantized file and what was measured of it.

    Attributes:
        file: The file, with its metadata.
        card: Its card.
        size: Bytes of the file, and of its weights if they are in a separate file.
        checked: Number of images on which the float32 graph was compared with PyTorch.
        error: Maximum difference from PyTorch's output, relative to its largest value.
        measured: The counts on the held-out images.
    """

    file: ExportedFile
    card: Path
    size: int
    checked: int
    error: float
    measured: Measured


def export_int8(
    model: nn.Module,
    calibration: Selection,
    held_out: Selection,
    output: Path,
    export_format: str,
    *,
    facts: Mapping[str, str],
    batch_size: int | None = None,
    opset: int = OPSET,
    img_size: int | None = None,
    max_loss: float = MAX_LOSS,
    force: bool = False,
) -> QuantizedExport:
    """Quantize a model, measure the loss on held-out images, and write it with a card.

    The float32 graph is compared with PyTorch before it is quantized, and both are measured in the runtime.

    Args:
        model: A timm model with a classifier; it is not modified.
        calibration: Images for calibration, see `calibration_and_held_out`.
        held_out: Labelled images to measure the accuracy on.
        output: File to write, with int8 in its name; the card is `card_path` of it.
        export_format: `onnx` or `openvino`.
        facts: Metadata of the file, those of `export_metadata`.
        batch_size: Batch size, or None for a dynamic one.
        opset: Version of ONNX's operators.
        img_size: Height and width of the images, or None for those of the model's config.
        max_loss: Largest loss of top-1 in percentage points.
        force: Whether to write a file whose loss is larger, or cannot be measured.

    Returns:
        The file and the measurements.

    Raises:
        InputError: The images or the labels do not fit the model, it cannot be quantized, or the file cannot be
            written.
        CheckError: The loss is larger than `max_loss` or cannot be measured, or the graph does not compute the model's
            output. Existing files are kept.
    """
    check_output(output, export_format, "int8")
    require(*EXPORT, *NEEDS[export_format])
    if output_name(model) != "logits":
        raise InputError("the model has no classifier, so that its loss of accuracy cannot be measured")
    classes = classes_of(model, held_out)
    images = _calibration_images(model, calibration, img_size)
    sample = images[:: math.ceil(len(images) / CHECKED)]
    graph, difference = float_graph(model, sample, export_format, opset)
    quantized = _quantized(graph, images, export_format)
    runs = {"float32": _runner(graph, export_format), "int8": _runner(quantized, export_format)}
    measured = measure(runs, model, held_out, classes, img_size)
    problem = check_loss(measured, classes, max_loss, force, output)
    data = {"calibration_data": calibration.data, "calibration_images": str(len(images)), "max_loss": f"{max_loss:g}"}
    facts = {**facts, **measured_facts(measured, classes), "evaluation_data": held_out.data, **data}
    facts |= method_facts(model, export_format) | ({"warning": problem} if problem else {})
    reproduced = runs["int8"](sample.numpy())
    fix_batch_size(quantized, batch_size, sample)
    file, size = _write(quantized, output, facts, export_format, (batch_size or SEVERAL, sample, reproduced))
    return QuantizedExport(file, card_path(output), size, len(sample), difference, measured)


def _calibration_images(model: nn.Module, calibration: Selection, img_size: int | None) -> torch.Tensor:
    """Load the images for calibration, and check them.

    Raises:
        InputError: They are invalid.
    """
    try:
        return check_calibration(model, load_images(model, calibration, img_size))
    except ValueError as error:
        raise InputError(str(error), "calibrate") from error


def float_graph(model: nn.Module, images: torch.Tensor, export_format: str, opset: int = OPSET) -> tuple[Any, float]:
    """Export a model in float32 and compare it with PyTorch.

    Args:
        model: The model.
        images: Images (N, C, H, W) to compare the outputs for.
        export_format: `onnx` or `openvino`.
        opset: Version of ONNX's operators.

    Returns:
        The ONNX or OpenVINO model, with a dynamic batch size, and the maximum difference of its output from PyTorch's,
        relative to its largest value.

    Raises:
        InputError: The model cannot be exported.
        CheckError: The outputs differ.
    """
    graph: Any = to_onnx(model, images[:2], opset=opset) if export_format == "onnx" else to_openvino(model, images[:2])
    expected = expected_output(model, images)
    return graph, check_file(graph, RUNTIMES[export_format], images, expected, (1, SEVERAL), "float32", True)[0]


def classes_of(model: Any, held_out: Selection) -> Classes:
    """Map the labels of held-out images to the model's classes; warn if the mapping is uncertain.

    Raises:
        InputError: They do not fit.
    """
    source, number = held_out.source, int(model.num_classes)
    benchmark = None
    if number == 1000:
        benchmark = recognize(source.name, source.split, source.class_names, len(source.rows))
    try:
        classes = match_classes(source.class_names, number, model.pretrained_cfg.get("label_names"), benchmark)
    except InputError as error:
        raise InputError(str(error), "calibrate") from error
    if classes.warning:
        warn(classes.warning, "calibrate")
    labels = labels_of(source)
    for i in held_out.indices:  # checked before hours of work
        try:
            classes.targets(None if labels[i] < 0 else int(labels[i]), None)
        except InputError as error:
            raise InputError(f"image {i} of {held_out.data}: {error}", "calibrate") from error
    return classes


def _quantized(graph: Any, images: torch.Tensor, export_format: str) -> Any:
    quantize = quantize_onnx if export_format == "onnx" else quantize_openvino
    if slow := not has_int8_instructions():
        warn(
            "this processor has no instructions for int8 (VNNI), so the file is hardly faster here; its weights "
            "use 7 bits, because sums of 8 bits would saturate"
        )
    try:
        return quantize(graph, images, half_range=slow)
    except (InputError, OSError):
        raise
    except Exception as error:  # each library raises its own types
        raise InputError(f"the model cannot be quantized: {first_line(error)}") from error


def _runner(graph: Any, export_format: str) -> Runner:
    return run_onnx(graph) if export_format == "onnx" else run_openvino(graph)


@torch.inference_mode()
def measure(
    runs: Mapping[str, Runner], model: nn.Module, held_out: Selection, classes: Classes, img_size: int | None = None
) -> Measured:
    """Count correct predictions of both precisions on held-out images, each image once.

    Args:
        runs: The networks `float32` and `int8`.
        model: The timm model, whose preprocessing is applied.
        held_out: The images.
        classes: The mapping of their labels.
        img_size: Height and width of the images, or None for those of the model's config.

    Raises:
        InputError: An image or a label cannot be used, or logits are NaN or infinite.
    """
    samples = held_out.samples(model, classes.targets, img_size)
    loader = DataLoader(
        samples,
        batch_size=BATCH_SIZE,
        num_workers=int(len(samples) > 1000),
        collate_fn=collate,
        worker_init_fn=ignore_job_signals,
    )
    counts = {precision: torch.zeros(3, dtype=torch.long) for precision in runs}
    same = 0
    with progress_bar(None, total=len(samples), desc="measure", unit="image") as progress:
        for images, targets, bad in loader:
            for sample in bad:
                refuse(sample)
            predictions = []
            for precision, run in runs.items():
                logits = torch.from_numpy(run(images.numpy()))
                logits = logits if classes.subset is None else logits[:, classes.subset]
                counts[precision] += count_batch(logits, targets)
                predictions.append(logits.argmax(1))
            same += int((predictions[0] == predictions[1]).sum())
            progress.update(len(images))
    correct = {precision: (int(count[1]), int(count[2])) for precision, count in counts.items()}
    return Measured(len(samples), correct, same)


def check_loss(measured: Measured, classes: Classes, max_loss: float, force: bool, output: Path) -> str:
    """Check that quantization costs at most `max_loss` points of top-1; with `force` only warn.

    Returns:
        A warning for metadata and card, or "".

    Raises:
        CheckError: The loss is larger, or meaningless, because the float32 model is no better than chance.
    """
    number = len(classes.subset or range(classes.num_classes))
    by_chance = measured.images / number
    problem = ""
    if measured.correct["float32"][0] < by_chance + 2 * math.sqrt(by_chance * (1 - 1 / number)):
        problem = (
            f"the float32 model has a top-1 of {measured.percent('float32', 0):.3f} on {measured.images} images, no "
            "better than chance, so that the loss cannot be measured; check the model, and that the labels are its "
            "classes"
        )
    elif 100 * (measured.correct["float32"][0] - measured.correct["int8"][0]) > max_loss * measured.images:
        problem = (
            f"int8 loses {measured.loss():.3f} points of top-1 on {measured.images} images "
            f"(float32 {measured.percent('float32', 0):.3f}, int8 {measured.percent('int8', 0):.3f}), more than the "
            f"limit of {max_loss:g}"
        )
    if problem and not force:
        raise CheckError(f"{problem}; {output} is not written")
    if problem:
        warn(problem)
    elif measured.images < FEW:
        warn(f"the loss is measured on only {measured.images} images, each of {100 / measured.images:.1f} points")
    return problem


def measured_facts(measured: Measured, classes: Classes) -> dict[str, str]:
    """Return accuracies and losses as metadata; top-5 only if there are more classes."""
    number = len(classes.subset or range(classes.num_classes))
    facts = {"precision": "int8", "evaluation_images": str(measured.images), "same_top1": str(measured.same_top1)}
    for k, key in enumerate(LABELS):
        if k == 0 or number > TOPK:
            facts |= {f"{key}_{precision}": f"{measured.percent(precision, k):.3f}" for precision in measured.correct}
            facts[f"{key}_loss"] = f"{measured.loss(k):.3f}"
    return facts


def method_facts(model: nn.Module, export_format: str) -> dict[str, str]:
    """Return the method, norms in float, runtime, processor and versions as metadata."""
    libraries = ("res2net-zoo", "torch", "timm", *LIBRARIES[export_format])
    versions = {name: importlib.metadata.version(name) for name in libraries}
    package = RUNTIMES[export_format]
    return {
        "quantization": METHODS[export_format],
        "float_norms": json.dumps([name for name, part in model.named_modules() if isinstance(part, OTHER_NORMS)]),
        "runtime": f"{package} {versions[package]}",
        "processor": processor() + " without int8 instructions" * (not has_int8_instructions()),
        "versions": json.dumps(versions),
    }


def fix_batch_size(quantized: Any, batch_size: int | None, images: torch.Tensor) -> None:
    """Give a graph a fixed batch size, in place; it is quantized with a dynamic one."""
    if batch_size is None:
        return
    if not hasattr(quantized, "graph"):
        quantized.reshape([batch_size, *images.shape[1:]])
        return
    for value in (*quantized.graph.input, *quantized.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch_size
    del quantized.graph.value_info[:]  # of the dynamic size


def _write(
    quantized: Any, output: Path, facts: dict[str, str], export_format: str, check: tuple[int, torch.Tensor, Any]
) -> tuple[ExportedFile, int]:
    """Write file and card together, after checking that the file computes what was measured."""
    place = output.absolute()
    companions = [card_path(place)] if export_format == "onnx" else [place.with_suffix(".bin"), card_path(place)]
    try:
        with replaced_together(place, *companions) as temporary:
            _save(quantized, temporary)
            file = read(temporary)
            facts = facts | {"layers": str(len(file.layers)), "float_layers": json.dumps(file.float_layers)}
            set_metadata(quantized, facts)
            _save(quantized, temporary)
            file = read(temporary)
            if file.precision != "int8":
                raise InputError(
                    f"the model has no layer that can be quantized: its precision is still {file.precision}"
                )
            batch, images, expected = check
            difference, _ = compare(_runner(temporary, export_format), images.numpy(), expected, [batch])
            if not difference <= REPRODUCED:
                raise CheckError(
                    f"the file differs from what was measured by {difference:.1e}; {output} is not written"
                )
            card_path(temporary).write_text(str(quantized_card(file)), encoding="utf-8")
            size = sum(path.stat().st_size for path in file.files)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
    return read(output), size


def _save(quantized: Any, path: Path) -> None:
    if hasattr(quantized, "graph"):
        path.write_bytes(quantized.SerializeToString())
    else:
        save_ir(quantized, path, "float32")
