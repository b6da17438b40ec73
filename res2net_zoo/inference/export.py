"""Export of a model to ONNX or OpenVINO IR, to run without PyTorch and without this package.

Both formats are exported by `torch.export` and ONNX, with BatchNorm folded. A file is written only after a runtime
has reproduced the model's output on real images. Its metadata have the preprocessing and the names of the classes
(`export_metadata`).
"""

import contextlib
import copy
import importlib.metadata
import json
import os
import threading
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from timm.utils import reparameterize_model
from torch import nn

from res2net_zoo.data.images import Sample
from res2net_zoo.data.preprocessing import color_mode, data_config, evaluation_samples
from res2net_zoo.utils.errors import InputError, first_line
from res2net_zoo.utils.files import is_temporary, locked, make_readable, temporary_file, temporary_folder
from res2net_zoo.utils.packages import require
from res2net_zoo.utils.private_apis import hidden
from res2net_zoo.weights.provenance import UNKNOWN, Provenance, shown

if TYPE_CHECKING:
    import onnx
    import openvino

FORMATS = {"onnx": ".onnx", "openvino": ".xml"}
EXPORT = ("exporting needs", "export")  # for `require`
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
# The native opset of torch's exporter, from which it converts to later ones. Every runtime since 2023 supports it.
OPSET = 18
# Maximum difference from the model's logits, relative to the largest logit. Each float16 weight has a relative error
# of 5e-4.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
SEVERAL = 4  # size of the larger of the two batches that check a file with a dynamic batch size
INPUT = "images"
SECTION = "res2net_zoo"  # section of an IR's rt_info
ONNX_LIMIT = 2**31 - 2**24  # bytes of weights; an ONNX file of up to 2 GB also contains the graph

EXPORTING = threading.Lock()  # torch's exporter is not thread-safe; concurrent exports break all later ones

# Maps images (N, C, H, W) to logits (N, classes), both float32.
Runner = Callable[[np.ndarray], np.ndarray]


class CheckError(Exception):
    """The output of an exported file differs from the model's; the message is one line."""


@dataclass(frozen=True)
class Exported:
    """An exported file and the result of its check.

    Attributes:
        path: The file.
        size: Bytes of the file, and of its weights if they are in a separate file.
        version: Version of the format, such as `ONNX opset 18` or `OpenVINO IR 11`.
        inputs: Name and shape of the input.
        outputs: Name and shape of the output.
        runtime: Runtime of the check.
        batches: Batch sizes of the check.
        images: Number of images of the check.
        error: Maximum difference from the model's output, relative to its largest value.
        same_top1: Number of images with the same top-1 prediction as the model, or None if the output is not
            logits.
    """

    path: Path
    size: int
    version: str
    inputs: str
    outputs: str
    runtime: str
    batches: tuple[int, ...]
    images: int
    error: float
    same_top1: int | None


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which otherwise reports every import.

    Raises:
        InputError: It is not installed.
    """
    require(*EXPORT, "openvino")
    with hidden("openvino_telemetry"):
        import openvino
    return openvino


@cache
def openvino_core() -> Any:
    """Return the OpenVINO runtime; a process must have only one.

    Each `Core` replaces the signal stack of the thread that creates it, and restores the previous one when it is
    destroyed. If two are destroyed in the order of their creation, the thread is left with a freed stack, and the
    next signal with a handler in Python, such as that of a finished loader worker, crashes the process.

    Raises:
        InputError: OpenVINO is not installed.
    """
    return import_openvino().Core()


def export_metadata(
    model: nn.Module, name: str, img_size: int | None = None, origin: Provenance = UNKNOWN
) -> dict[str, str]:
    """Return the metadata of an exported file, such as its preprocessing, as strings.

    Args:
        model: A timm model.
        name: Name as for `create_model`; only the last part of a folder's path is included.
        img_size: Height and width of the images, or None for those of the model's config.
        origin: Provenance of the weights.

    Returns:
        `model`, `architecture`, `color` (RGB or L), `interpolation`, `crop_mode`; as JSON `input_size`
        (C, H, W), `mean` and `std` of pixels from 0 to 1, `crop_pct`, and `class_names` if the config has
        them; `provenance` of the weights as JSON, and its `license` and `base_model` if known.
    """
    cfg: Any = model.pretrained_cfg
    config = data_config(model, img_size)
    names = cfg.get("label_names") or []
    known = {"license": origin.license, "base_model": origin.derives_from}
    return {
        "model": shown(name),
        "architecture": cfg["architecture"],
        "color": color_mode(config),
        "interpolation": config["interpolation"],
        "crop_mode": config["crop_mode"],
        **{key: json.dumps(config[key]) for key in ("input_size", "mean", "std", "crop_pct")},
        **({"class_names": json.dumps(list(names), ensure_ascii=False)} if names else {}),
        **{key: value for key, value in known.items() if value},
        "provenance": json.dumps(origin.to_dict(), ensure_ascii=False),
    }


def load_images(model: nn.Module, rows: Sequence[dict[str, Any]], img_size: int | None = None) -> torch.Tensor:
    """Decode images and apply the model's preprocessing.

    Args:
        model: A timm model.
        rows: Each has an undecoded `image`, as `bytes` or `path`.
        img_size: Height and width, or None for those of the model's config.

    Returns:
        Images (N, C, H, W).

    Raises:
        InputError: An image cannot be decoded.
    """
    sample = evaluation_samples(model, img_size=img_size)
    return stacked(sample(f"image {i}", row) for i, row in enumerate(rows))


def stacked(samples: Iterable[Sample]) -> torch.Tensor:
    """Return the images of samples as (N, C, H, W).

    Raises:
        InputError: A sample is without an image.
    """
    images = []
    for sample in samples:
        if sample.image is None:
            refuse(sample)
        images.append(sample.image)
    return torch.stack(images)


def refuse(sample: Sample) -> NoReturn:
    """Raise the `InputError` of a sample without an image."""
    if sample.fatal is not None:
        raise InputError(f"{sample.place}: {sample.fatal}")
    raise InputError(f"{sample.place} is corrupt ({sample.corrupt}); remove it")


def to_program(
    model: nn.Module, example_input: torch.Tensor, dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """Export a copy of a model with BatchNorm folded, on a CPU in float32.

    Args:
        model: The model; it is not modified.
        example_input: Images (N, C, H, W) of the size to export for.
        dynamic_batch: Whether the batch size is dynamic, or N.

    Returns:
        The exported program.

    Raises:
        InputError: The model does not support such images, or torch cannot export it.
    """
    folded = reparameterize_model(copy.deepcopy(model).cpu().float().eval(), inplace=True)
    folded = folded.to(memory_format=torch.contiguous_format)  # NNCF quantizes channels_last weights worse
    images = example_input.cpu().float()
    if dynamic_batch and len(images) < 2:  # torch.export specializes a dimension of 1 to a constant
        images = images[:1].expand(2, -1, -1, -1).contiguous()
    size = "x".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad():
            folded(images)
    except Exception as error:  # such as an assertion of DLA, or a kernel larger than its input
        raise InputError(f"the model does not support images of {size}: {first_line(error)}") from error
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    try:
        with EXPORTING, torch.no_grad():
            return torch.export.export(folded, (images,), dynamic_shapes=shapes)
    except Exception as error:  # of many types, depending on the model
        raise InputError(f"torch cannot export this model: {first_line(error)}") from error


def to_onnx(
    model: nn.Module,
    example_input: torch.Tensor,
    *,
    dynamic_batch: bool = True,
    opset: int = OPSET,
    facts: dict[str, str] | None = None,
) -> "onnx.ModelProto":
    """Export a model to ONNX, with BatchNorm folded.

    Args:
        model: The model; it is not modified.
        example_input: Images (N, C, H, W) of the size to export for.
        dynamic_batch: Whether the batch size is dynamic, or N.
        opset: Version of ONNX's operators, 18 or later.
        facts: Metadata of the file, such as those of `export_metadata`.

    Returns:
        A model with the input `images` and the output `logits`, or `features` without a classifier.

    Raises:
        InputError: The model does not support such images, torch cannot export it, it is too large for one
            file, or the opset is unsupported.
    """
    require(*EXPORT, "onnx", "onnxscript")
    _check_opset(opset)
    if sum(tensor.numel() * 4 for tensor in model.state_dict().values()) > ONNX_LIMIT:
        raise InputError("the weights are too large for an ONNX model, whose limit is 2 GB")
    program = to_program(model, example_input, dynamic_batch)
    try:
        with EXPORTING:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[output_name(model)],
                verbose=False,
            )
    except Exception as error:  # as above
        raise InputError(f"torch cannot export this model to ONNX: {first_line(error)}") from error
    assert made is not None
    proto = made.model_proto
    if opset not in (got := [entry.version for entry in proto.opset_import if not entry.domain]):
        raise InputError(f"torch cannot export this model in opset {opset}; use {got}")
    # Remove the stack traces, with paths of this machine, that torch stores with each node.
    graph = proto.graph
    parts: Any = (proto, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output)
    for entry in parts:
        del entry.metadata_props[:]
    set_metadata(proto, facts or {})
    return proto


def _check_opset(opset: int) -> None:
    import onnx

    if not OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise InputError(
            f"opset {opset} is unsupported; use one from {OPSET} to {onnx.defs.onnx_opset_version()}, "
            "the latest of the installed onnx"
        )


def to_openvino(
    model: nn.Module,
    example_input: torch.Tensor,
    *,
    dynamic_batch: bool = True,
    facts: dict[str, str] | None = None,
) -> "openvino.Model":
    """Export a model to OpenVINO, with BatchNorm folded.

    Args:
        model: The model; it is not modified.
        example_input: Images (N, C, H, W) of the size to export for.
        dynamic_batch: Whether the batch size is dynamic, or N.
        facts: Metadata for the section `res2net_zoo` of its rt_info, such as those of `export_metadata`.

    Returns:
        A model with the input `images` and the output `logits`, or `features` without a classifier.

    Raises:
        InputError: The model does not support such images, or it cannot be exported.
    """
    # openvino.convert_model does not fix the size of the images, and takes 2 seconds longer.
    proto = to_onnx(model, example_input, dynamic_batch=dynamic_batch)
    result = openvino_core().read_model(proto.SerializeToString())
    set_metadata(result, facts or {})
    return result


def set_metadata(model: Any, facts: Mapping[str, str]) -> None:
    """Add metadata to an ONNX or OpenVINO model, in place."""
    for key, value in facts.items():
        if hasattr(model, "metadata_props"):
            model.metadata_props.add(key=key, value=value)
        else:
            model.set_rt_info(value, [SECTION, key])


def output_name(model: nn.Module) -> str:
    """Return the name of an exported model's output: `logits`, or `features` without a classifier."""
    return "features" if getattr(model, "num_classes", None) == 0 else "logits"


def run_onnx(source: "Path | onnx.ModelProto", threads: int = 0) -> Runner:
    """Load an ONNX model into ONNX Runtime, on the CPU.

    Args:
        source: The file, or the model itself.
        threads: Number of CPU threads; 0 for the runtime's default.

    Returns:
        A function from images (N, C, H, W) to the model's output, in float32.
    """
    require(*EXPORT, "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are also raised
    loaded = str(source) if isinstance(source, Path) else source.SerializeToString()
    session = onnxruntime.InferenceSession(loaded, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def openvino_settings(precision: str, threads: int = 0) -> dict[str, Any]:
    """Return OpenVINO's settings for minimal latency on a CPU.

    Args:
        precision: `f32`, `f16`, or `bf16`, OpenVINO's default if the processor supports it.
        threads: Number of CPU threads; 0 for the runtime's default.
    """
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return settings | {"INFERENCE_NUM_THREADS": threads} if threads else settings


def run_openvino(source: "Path | openvino.Model", precision: str = "f32", threads: int = 0) -> Runner:
    """Compile an OpenVINO model for the CPU.

    Args:
        source: The IR's .xml file, or the model itself.
        precision: See `openvino_settings`.
        threads: See `openvino_settings`.

    Returns:
        A thread-safe function from images (N, C, H, W) to the model's output, in float32.
    """
    compiled = openvino_core().compile_model(source, "CPU", openvino_settings(precision, threads))
    lock = threading.Lock()  # all threads share one request

    def run(images: np.ndarray) -> np.ndarray:
        with lock:
            return compiled(images)[0]

    return run


def export(
    model: nn.Module,
    images: torch.Tensor,
    output: Path,
    export_format: str,
    *,
    batch_size: int | None = None,
    opset: int = OPSET,
    precision: str = "float32",
    facts: dict[str, str] | None = None,
) -> Exported:
    """Export a model to a file, after checking that its output matches the model's.

    Args:
        model: The model; it is not modified.
        images: Preprocessed images (N, C, H, W) for the check. The file is for images of their size.
        output: File to write; the weights of an IR are in a .bin file of the same name.
        export_format: `onnx` or `openvino`.
        batch_size: Batch size, or None for a dynamic one.
        opset: Version of ONNX's operators.
        precision: Type of an IR's weights, `float32` or `float16`.
        facts: Metadata of the file, such as those of `export_metadata`.

    Returns:
        The file and the result of its check.

    Raises:
        InputError: The model cannot be exported with these settings, or the file cannot be written.
        CheckError: The output of the file differs from the model's. An existing file is kept.
    """
    check_output(output, export_format)
    require(*EXPORT, *NEEDS[export_format])
    facts = (facts or {}) | {"precision": precision}
    batches = (1, SEVERAL) if batch_size is None else (batch_size,)
    classifies = output_name(model) == "logits"
    package = "onnxruntime" if export_format == "onnx" else "openvino"
    try:
        written = _write_new(model, images, output, export_format, batch_size, opset, precision, facts)
        with written as (new, version):
            expected = expected_output(model, images)
            difference, same = check_file(new, package, images, expected, batches, precision, classifies)
    except CheckError as error:
        raise CheckError(f"{error}; {output} is not written") from error
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
    batch = batch_size or "batch"
    files = [output] if export_format == "onnx" else [output, output.with_suffix(".bin")]
    return Exported(
        path=output,
        size=sum(file.stat().st_size for file in files),
        version=version,
        inputs=f"{INPUT}: {_shape(batch, images)}",
        outputs=f"{output_name(model)}: {_shape(batch, expected)}",
        runtime=f"{package} {importlib.metadata.version(package)}",
        batches=batches,
        images=len(images),
        error=difference,
        same_top1=same if classifies else None,
    )


def _shape(batch: int | str, array: torch.Tensor | np.ndarray) -> str:
    """Return the shape of an array as text, with a different batch size."""
    return " x ".join(map(str, (batch, *array.shape[1:])))


@contextlib.contextmanager
def _write_new(
    model: nn.Module,
    images: torch.Tensor,
    output: Path,
    export_format: str,
    batch_size: int | None,
    opset: int,
    precision: str,
    facts: dict[str, str] | None,
) -> Iterator[tuple[Path, str]]:
    """Write a model to a temporary file, which replaces `output` at the end; yield it and its format's version."""
    example = images[:1].expand(batch_size or 2, -1, -1, -1)
    dynamic = batch_size is None
    if export_format == "onnx":
        proto = to_onnx(model, example, dynamic_batch=dynamic, opset=opset, facts=facts)
        with temporary_file(output) as temporary:
            temporary.write_bytes(proto.SerializeToString())
            yield temporary, f"ONNX opset {opset}"
    else:
        made = to_openvino(model, example, dynamic_batch=dynamic, facts=facts)
        with temporary_ir(output) as temporary:
            save_ir(made, temporary, precision)
            yield temporary, f"OpenVINO IR {ir_version(temporary)}"


def check_file(
    file: "Path | onnx.ModelProto | openvino.Model",
    package: str,
    images: torch.Tensor,
    expected: np.ndarray,
    batches: Sequence[int],
    precision: str,
    classifies: bool,
) -> tuple[float, int]:
    """Run an exported model and compare its output with the model's.

    Args:
        file: The exported model, or its file.
        package: The runtime, `onnxruntime` or `openvino`.
        images: Preprocessed images, (N, C, H, W).
        expected: The model's output for them.
        batches: Batch sizes.
        precision: Type of the weights, `float32` or `float16`.
        classifies: Whether the output is logits.

    Returns:
        See `compare`.

    Raises:
        CheckError: It does not run, or the outputs differ.
    """
    try:
        run = run_onnx(file) if package == "onnxruntime" else run_openvino(file)
        difference, same = compare(run, images.numpy(), expected, batches)
    except Exception as error:  # each runtime raises its own types
        raise CheckError(f"{package} cannot run the exported model ({first_line(error)})") from error
    if not difference <= TOLERANCE[precision]:  # so that NaN fails too
        raise CheckError(
            f"the exported model's output differs from the model's by {difference:.1e} of its largest value, "
            f"more than {TOLERANCE[precision]:.0e}"
        )
    if precision == "float16" and classifies and same < len(images):
        raise CheckError(
            f"with float16 weights, top-1 is the same as the model's for only {same} of {len(images)} images"
        )
    return difference, same


def card_path(file: Path) -> Path:
    """Return the path of a quantized file's card, such as `digits-int8.onnx.md`."""
    return file.with_name(f"{file.name}.md")


def names_int8(file: Path) -> bool:
    """Return whether the name of a file states that it is quantized."""
    return "int8" in file.name.lower()


def check_output(output: Path, export_format: str, precision: str = "float32") -> None:
    """Check that a file name fits format and precision, and does not replace an unrelated file.

    Args:
        output: File to write.
        export_format: `onnx` or `openvino`.
        precision: `float32`, `float16` or `int8`.

    Raises:
        InputError: It has another suffix or is a folder, it has "int8" in its name and is not quantized or vice
            versa, or weights or card would replace a file that does not belong to an exported one.
    """
    suffix = FORMATS[export_format]
    if output.suffix != suffix:
        raise InputError(
            f"{export_format} files end in {suffix}; use {output.with_suffix('')}{suffix} instead of {output.name}"
        )
    if names_int8(output) != (precision == "int8"):
        if precision == "int8":
            proposed = output.with_name(f"{output.stem}-int8{suffix}")
            raise InputError(f"the name of a quantized file must contain int8; use {proposed}", "output")
        raise InputError(f"{output.name} names a quantized file, but the weights are in {precision}; use another name")
    companions = [output.with_suffix(".bin")] * (export_format == "openvino")
    companions += [card_path(output)] * (precision == "int8")
    if output.parent.is_dir():
        finish_replacing_together(output, *companions)
    for path in (output, *companions):
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file")
    kinds = {".bin": "IR", ".md": "model"}
    for path in companions:
        if path.exists() and not output.exists():
            raise InputError(f"{path} exists without its {kinds[path.suffix]}; move it, or use another file name")


def save_ir(model: "openvino.Model", path: Path, precision: str) -> None:
    """Write an OpenVINO model.

    Args:
        model: The model.
        path: The .xml file; the .bin file has the same name.
        precision: Type of the weights, `float32` or `float16`.

    Raises:
        OSError: The files cannot be written.
    """
    try:
        import_openvino().save_model(model, path, compress_to_fp16=precision == "float16")
    except RuntimeError as error:  # OpenVINO's type for a failed write
        raise OSError(str(error)) from error


@contextlib.contextmanager
def temporary_ir(path: Path) -> Iterator[Path]:
    """Yield a path to write an IR to, which replaces an existing one when it is complete; see `replaced_together`.

    Args:
        path: The .xml file; the .bin file has the same name.
    """
    path = path.resolve()
    with replaced_together(path, path.with_suffix(".bin")) as temporary:
        yield temporary


@contextlib.contextmanager
def replaced_together(path: Path, *companions: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which replaces an existing one together with its companions.

    Several files cannot be replaced atomically. So the old main file is moved first and the new one last, and the main
    file of one version is never next to a companion of another. If the process is killed in between, the new files are
    in the folder `.NAME-new-*` next to them, and `finish_replacing_together` moves them.

    Args:
        path: The main file, with an absolute path.
        companions: The other files, in the same folder. They are written next to the path that this yields.
    """
    with locked(path), temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        old = folder / "old"
        every = (*companions, path)
        for place in every:
            make_readable(folder / place.name)
            with (folder / place.name).open("rb") as opened:
                os.fsync(opened.fileno())
        old.mkdir()  # marks the files in the folder as complete
        moved: list[Path] = []
        placed: list[Path] = []
        try:
            for place in reversed(every):
                if place.exists():
                    place.replace(old / place.name)
                    moved.append(place)
            for place in every:
                (folder / place.name).replace(place)
                placed.append(place)
        except BaseException:
            for place in reversed(placed):
                place.unlink()
            for place in reversed(moved):
                (old / place.name).replace(place)
            raise


def finish_replacing_together(path: Path, *companions: Path) -> None:
    """Complete a replacement by a process that was killed.

    Args:
        path: The main file.
        companions: The other files.

    Raises:
        InputError: Another process is writing it.
    """
    path = path.resolve()
    whole = [
        folder
        for folder in path.parent.iterdir()
        if folder.name.startswith(f".{path.name}-new-") and is_temporary(folder.name) and (folder / "old").is_dir()
    ]
    if not whole:
        return
    with locked(path):
        for folder in whole:
            for name in (*(companion.name for companion in companions), path.name):
                with contextlib.suppress(FileNotFoundError):  # already moved
                    (folder / name).replace(path.with_name(name))


def ir_version(path: Path) -> str:
    """Return the version of an IR's .xml file."""
    for _, element in xml.etree.ElementTree.iterparse(path, events=["start"]):
        return element.get("version", "unknown")
    return "unknown"


def expected_output(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    """Compute the output of the original model, before folding, on a CPU in float32."""
    model = copy.deepcopy(model).cpu().float().eval()
    with torch.no_grad():
        # In small batches, because the maps of all images may not fit into memory.
        expected = torch.cat([model(part) for part in images.split(SEVERAL)])
    if not expected.isfinite().all():
        raise InputError("the model's output has NaN or infinite values")
    return expected.numpy()


def compare(run: Runner, images: np.ndarray, expected: np.ndarray, batches: Sequence[int]) -> tuple[float, int]:
    """Return the maximum relative error over all images and batch sizes, and the number of images of equal top-1."""
    difference, same = 0.0, np.ones(len(images), dtype=bool)
    for batch in batches:
        parts = []
        for start in range(0, len(images), batch):
            # A static batch size supports no fewer images: fill up the last batch with the first images.
            parts.append(run(images.take(range(start, start + batch), axis=0, mode="wrap")))
        answers = np.concatenate(parts)[: len(images)]
        if answers.shape != expected.shape:
            raise ValueError(f"its output has the shape {answers.shape}, but the model's has {expected.shape}")
        difference = np.maximum(difference, np.abs(answers - expected).max())  # propagates NaN
        same &= answers.reshape(len(images), -1).argmax(1) == expected.reshape(len(images), -1).argmax(1)
    return float(difference / np.abs(expected).max()), int(same.sum())
