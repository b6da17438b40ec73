"""From a model to a file that runs without PyTorch and without this package: ONNX and OpenVINO IR.

Both come from `torch.export` by way of ONNX, with BatchNorm folded. A file takes its place only after a
runtime has computed from it what the model computes on real images. It carries what its user must know:
the preprocessing and the names of the classes (`describe`).
"""

import contextlib
import copy
import importlib.metadata
import importlib.util
import json
import os
import threading
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.utils import reparameterize_model
from torch import nn

from res2net_zoo.data.preprocessing import color_mode, data_config, evaluation_samples
from res2net_zoo.utils.errors import InputError, first_line
from res2net_zoo.utils.files import is_temporary, locked, make_readable, temporary_file, temporary_folder
from res2net_zoo.utils.private_apis import hidden
from res2net_zoo.weights.provenance import UNKNOWN, Provenance, shown

if TYPE_CHECKING:
    import onnx
    import openvino

FORMATS = {"onnx": ".onnx", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
# The opset that torch writes its translations in: a later one is made of it by conversion, and this
# one every runtime since 2023 reads.
OPSET = 18
# Largest difference from the model's logits, relative to the largest of them. Weights of 16 bits have
# a relative error of 5e-4 each.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
SEVERAL = 4  # images in the larger of the batches that a file for any batch is checked with
INPUT = "images"
SECTION = "res2net_zoo"  # of an IR's rt_info
ONNX_LIMIT = 2**31 - 2**24  # bytes of weights, which leaves the graph itself some: one file holds 2 GB

EXPORTING = threading.Lock()  # torch's exporter works for one thread at a time; two at once break all later exports

# Takes images (N, C, H, W) and returns logits (N, classes), both float32.
Runner = Callable[[np.ndarray], np.ndarray]


class CheckError(Exception):
    """An exported file does not compute what the model does; the message is one line."""


@dataclass(frozen=True)
class Exported:
    """What was written, and what its check found.

    Attributes:
        path: The file.
        size: Its bytes, and those of its weights where they have a file of their own.
        version: Of its format, such as `ONNX opset 18` or `OpenVINO IR 11`.
        inputs: Name and shape of the input.
        outputs: Name and shape of the output.
        runtime: What it was checked in.
        batches: Sizes of the batches it was checked in.
        images: Number of images it was checked on.
        error: Largest difference from the model's output, relative to the largest of its values.
        same_top1: For how many images the first answer is the model's, or None where the output is
            no classes.
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


def require(*packages: str) -> None:
    """Find out before any work is done whether packages are there.

    Args:
        packages: Their names, such as `NEEDS` has them for each format.

    Raises:
        InputError: One is not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"exporting needs {' and '.join(missing)}; pip install 'res2net-zoo[export]'")


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which tells its makers of every import unless refused beforehand.

    Raises:
        InputError: It is not installed.
    """
    require("openvino")
    with hidden("openvino_telemetry"):
        import openvino
    return openvino


@cache
def openvino_core() -> Any:
    """Return the one OpenVINO runtime of this process.

    Each `Core` gives the thread that makes it another stack for its signals, and takes it away when it
    goes. Of two that go in the order they came in, the second leaves a stack behind that is no more:
    the next signal that Python listens to, such as that of a loader's worker ending, ends the process.

    Raises:
        InputError: OpenVINO is not installed.
    """
    return import_openvino().Core()


def describe(model: nn.Module, name: str, img_size: int | None = None, origin: Provenance = UNKNOWN) -> dict[str, str]:
    """Return what the user of an exported file must know, as the strings that it carries.

    Args:
        model: A timm model.
        name: What `create_model` was given; of a folder only its last part is told.
        img_size: Height and width of the images, or None for those of the model's config.
        origin: Where the weights come from.

    Returns:
        `model`, `architecture`, `color` (RGB or L), `interpolation`, `crop_mode`; as JSON `input_size`
        (C, H, W), `mean` and `std` of pixels from 0 to 1, `crop_pct`, and where the config has them
        `class_names`; `provenance`, the record of where the weights come from, as JSON, and of it `license`
        and `base_model` where they are known.
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
    """Decode images and give them the model's own preprocessing.

    Args:
        model: A timm model.
        rows: Each has an undecoded `image`: its `bytes`, or its `path`.
        img_size: Height and width, or None for those of the model's config.

    Returns:
        (N, C, H, W).

    Raises:
        InputError: An image cannot be decoded.
    """
    sample = evaluation_samples(model, img_size=img_size)
    images = []
    for i, row in enumerate(rows):
        result = sample(f"image {i}", row)
        if result.image is None:
            raise InputError(f"{result.place} is corrupt ({result.corrupt or result.fatal}); leave it out")
        images.append(result.image)
    return torch.stack(images)


def to_program(
    model: nn.Module, example_input: torch.Tensor, dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """Fold a copy of a model and write down what it computes, on a CPU in float32.

    Args:
        model: The model; it is left as it is.
        example_input: Images (N, C, H, W) of the size that the program is for.
        dynamic_batch: Whether the program is for any number of images, or for N.

    Returns:
        The program.

    Raises:
        InputError: The model takes no such images, or torch cannot export it.
    """
    folded = reparameterize_model(copy.deepcopy(model).cpu().float().eval(), inplace=True)
    images = example_input.cpu().float()
    if dynamic_batch and len(images) < 2:  # torch.export takes a single one for a constant
        images = images[:1].expand(2, -1, -1, -1).contiguous()
    size = "x".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad():
            folded(images)
    except Exception as error:  # DLA refuses some sizes by an assertion; of others a kernel does not fit
        raise InputError(f"the model takes no images of {size}: {first_line(error)}") from error
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    try:
        with EXPORTING, torch.no_grad():
            return torch.export.export(folded, (images,), dynamic_shapes=shapes)
    except Exception as error:  # there is no one type for it, and the model may be any of timm's
        raise InputError(f"torch cannot export this model: {first_line(error)}") from error


def to_onnx(
    model: nn.Module,
    example_input: torch.Tensor,
    *,
    dynamic_batch: bool = True,
    opset: int = OPSET,
    facts: dict[str, str] | None = None,
) -> "onnx.ModelProto":
    """Make an ONNX model, with BatchNorm folded.

    Args:
        model: The model; it is left as it is.
        example_input: Images (N, C, H, W) of the size that the result is for.
        dynamic_batch: Whether it is for any number of images, or for N.
        opset: Its version of ONNX's operators, 18 or later.
        facts: What it is to carry as metadata, such as what `describe` returns.

    Returns:
        Its input is `images`; its output `logits`, or `features` where the model has no classifier.

    Raises:
        InputError: The model takes no such images, torch cannot export it, it is too large for one
            file, or there is no such opset.
    """
    require("onnx", "onnxscript")
    _check_opset(opset)
    if sum(tensor.numel() * 4 for tensor in model.state_dict().values()) > ONNX_LIMIT:
        raise InputError("an ONNX model holds 2 GB, and the weights of this one are larger")
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
        raise InputError(f"torch cannot write this model in opset {opset}, but in {got}; name that one")
    # Torch notes for each node where in the Python files of this machine it comes from.
    graph = proto.graph
    parts: Any = (proto, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output)
    for entry in parts:
        del entry.metadata_props[:]
    for key, value in (facts or {}).items():
        proto.metadata_props.add(key=key, value=value)
    return proto


def _check_opset(opset: int) -> None:
    import onnx

    if not OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise InputError(
            f"opset {opset} cannot be written; name one from {OPSET} to {onnx.defs.onnx_opset_version()}, "
            "the newest that this version of onnx knows"
        )


def to_openvino(
    model: nn.Module,
    example_input: torch.Tensor,
    *,
    dynamic_batch: bool = True,
    facts: dict[str, str] | None = None,
) -> "openvino.Model":
    """Make an OpenVINO model, with BatchNorm folded.

    Args:
        model: The model; it is left as it is.
        example_input: Images (N, C, H, W) of the size that the result is for.
        dynamic_batch: Whether it is for any number of images, or for N.
        facts: What it is to carry in the section `res2net_zoo` of its rt_info, such as what `describe`
            returns.

    Returns:
        Its input is `images`; its output `logits`, or `features` where the model has no classifier.

    Raises:
        InputError: The model takes no such images, or it cannot be exported.
    """
    # Not by openvino.convert_model, which leaves the size of the images open and takes 2 seconds more.
    proto = to_onnx(model, example_input, dynamic_batch=dynamic_batch)
    result = openvino_core().read_model(proto.SerializeToString())
    for key, value in (facts or {}).items():
        result.set_rt_info(value, [SECTION, key])
    return result


def output_name(model: nn.Module) -> str:
    """Return what an exported model's output is called: `logits`, or `features` without a classifier."""
    return "features" if getattr(model, "num_classes", None) == 0 else "logits"


def run_onnx(source: "Path | onnx.ModelProto", threads: int = 0) -> Runner:
    """Load an ONNX model into ONNX Runtime, on the CPU.

    Args:
        source: Its file, or the model itself.
        threads: CPU threads; with 0 the runtime chooses.

    Returns:
        What runs it: images (N, C, H, W) to its output, in float32.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; they are raised as well
    loaded = str(source) if isinstance(source, Path) else source.SerializeToString()
    session = onnxruntime.InferenceSession(loaded, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def openvino_settings(precision: str, threads: int = 0) -> dict[str, Any]:
    """Return OpenVINO's settings for the least latency on a CPU.

    Args:
        precision: What to compute in: `f32`, `f16`, or `bf16`, which OpenVINO would take by itself where the
            processor has it.
        threads: CPU threads; with 0 the runtime chooses.
    """
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return settings | {"INFERENCE_NUM_THREADS": threads} if threads else settings


def run_openvino(source: "Path | openvino.Model", precision: str = "f32", threads: int = 0) -> Runner:
    """Compile an OpenVINO model for the CPU.

    Args:
        source: The IR's .xml file, or the model itself.
        precision: As for `openvino_settings`.
        threads: As for `openvino_settings`.

    Returns:
        What runs it: images (N, C, H, W) to its output, in float32. Calls from several threads take turns.
    """
    compiled = openvino_core().compile_model(source, "CPU", openvino_settings(precision, threads))
    lock = threading.Lock()  # it has one request for all threads

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
    """Write a model to a file, which takes its place once its output is found to be the model's.

    Args:
        model: The model; it is left as it is.
        images: What to hold it against the model on, preprocessed, (N, C, H, W). The file is for images
            of their size.
        output: Where to write it; an IR's weights stand beside it under the same name, in a .bin file.
        export_format: `onnx` or `openvino`.
        batch_size: Number of images the file is for, or None for any.
        opset: Version of ONNX's operators.
        precision: Of an IR's weights, `float32` or `float16`.
        facts: What the file is to carry, such as what `describe` returns.

    Returns:
        What was written and found.

    Raises:
        InputError: It cannot be exported so, or not written there.
        CheckError: What the file computes is not what the model does. An older file is left as it was.
    """
    check_output(output, export_format)
    require(*NEEDS[export_format])
    batches = (1, SEVERAL) if batch_size is None else (batch_size,)
    classifies = output_name(model) == "logits"
    package = "onnxruntime" if export_format == "onnx" else "openvino"
    try:
        with _written(model, images, output, export_format, batch_size, opset, precision, facts) as (new, version):
            expected = _expected(model, images)
            difference, same = _check(new, package, images, expected, batches, precision, classifies)
    except CheckError as error:
        raise CheckError(f"{error}; {output} is not written") from error
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
    batch = "batch" if batch_size is None else batch_size
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
    """Return the shape of an array as text, with another first size."""
    return " x ".join(map(str, (batch, *array.shape[1:])))


@contextlib.contextmanager
def _written(
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


def _check(
    file: Path,
    package: str,
    images: torch.Tensor,
    expected: np.ndarray,
    batches: Sequence[int],
    precision: str,
    classifies: bool,
) -> tuple[float, int]:
    """Run an exported model and compare its output with the model's.

    Args:
        file: The exported model.
        package: What runs it, `onnxruntime` or `openvino`.
        images: Preprocessed images, (N, C, H, W).
        expected: The model's output for them.
        batches: Numbers of images to run at a time.
        precision: Of the weights, `float32` or `float16`.
        classifies: Whether the output is logits.

    Returns:
        As `_compare`.

    Raises:
        CheckError: It does not run, or the outputs differ.
    """
    try:
        run = run_onnx(file) if package == "onnxruntime" else run_openvino(file)
        difference, same = _compare(run, images.numpy(), expected, batches)
    except Exception as error:  # each runtime has types of its own for it
        raise CheckError(f"{package} cannot run the exported model ({first_line(error)})") from error
    if not difference <= TOLERANCE[precision]:  # so that NaN fails too
        raise CheckError(
            f"the exported model's output differs from the model's by {difference:.1e} of its largest value, "
            f"more than {TOLERANCE[precision]:.0e}"
        )
    if precision == "float16" and classifies and same < len(images):
        raise CheckError(
            f"with weights in float16 the first answer is the model's for {same} of {len(images)} images only"
        )
    return difference, same


def check_output(output: Path, export_format: str) -> None:
    """Find out before any work is done whether a name fits a format and takes nobody else's place.

    Args:
        output: Where a file is to be written.
        export_format: `onnx` or `openvino`.

    Raises:
        InputError: It has another suffix, is a folder, or the weights beside it would replace a file
            that is no IR's.
    """
    if output.suffix != FORMATS[export_format]:
        raise InputError(
            f"{export_format} is written to a {FORMATS[export_format]} file; name {output.with_suffix('')}"
            f"{FORMATS[export_format]} in place of {output.name}"
        )
    weights = output.with_suffix(".bin")
    if export_format == "openvino" and output.parent.is_dir():
        finish_ir(output)
    for path in (output, weights) if export_format == "openvino" else (output,):
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file")
    if export_format == "openvino" and weights.exists() and not output.exists():
        raise InputError(f"{weights} is there, and no IR of it; move it, or name another file")


def save_ir(model: "openvino.Model", path: Path, precision: str) -> None:
    """Write an OpenVINO model.

    Args:
        model: The model.
        path: The .xml file; the .bin file has the same name.
        precision: Of the weights, `float32` or `float16`.

    Raises:
        OSError: It cannot be written.
    """
    try:
        import_openvino().save_model(model, path, compress_to_fp16=precision == "float16")
    except RuntimeError as error:  # which is how OpenVINO says it
        raise OSError(str(error)) from error


@contextlib.contextmanager
def temporary_ir(path: Path) -> Iterator[Path]:
    """Yield a path to write an IR to, which takes the place of another once it is whole.

    Two files cannot be replaced at once. So the old .xml goes first and the new one comes last: beside
    the .bin of one IR the .xml of another never stands. Killed in between, the new ones are in the
    folder `.NAME-new-*` beside them, and `finish_ir` puts them in their place.

    Args:
        path: The .xml file; the .bin file has the same name.
    """
    path = path.resolve()
    with locked(path), temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        old = folder / "old"
        for file in (temporary, temporary.with_suffix(".bin")):
            make_readable(file)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        old.mkdir()  # from here on what is in the folder is whole
        both = (path.with_suffix(".bin"), path)
        moved: list[Path] = []
        placed: list[Path] = []
        try:
            for place in reversed(both):
                if place.exists():
                    place.replace(old / place.name)
                    moved.append(place)
            for place in both:
                (temporary.parent / place.name).replace(place)
                placed.append(place)
        except BaseException:
            for place in reversed(placed):
                place.unlink()
            for place in reversed(moved):
                (old / place.name).replace(place)
            raise


def finish_ir(path: Path) -> None:
    """Put the files of an IR in their place where the process that was replacing it has died.

    Args:
        path: The .xml file.

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
            for place in (path.with_suffix(".bin"), path):
                with contextlib.suppress(FileNotFoundError):  # it was placed before
                    (folder / place.name).replace(place)


def ir_version(path: Path) -> str:
    """Return the version of an IR's .xml file."""
    for _, element in xml.etree.ElementTree.iterparse(path, events=["start"]):
        return element.get("version", "unknown")
    return "unknown"


def _expected(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    """Compute the model's own output, before any folding, on a CPU in float32."""
    model = copy.deepcopy(model).cpu().float().eval()
    with torch.no_grad():
        # A few at a time: the maps of all at once may not fit into memory.
        expected = torch.cat([model(part) for part in images.split(SEVERAL)])
    if not expected.isfinite().all():
        raise InputError("the model's output is not finite")
    return expected.numpy()


def _compare(run: Runner, images: np.ndarray, expected: np.ndarray, batches: Sequence[int]) -> tuple[float, int]:
    """Return the largest relative error over all images and batch sizes, and how many top-1 are the same in all."""
    difference, same = 0.0, np.ones(len(images), dtype=bool)
    for batch in batches:
        parts = []
        for start in range(0, len(images), batch):
            # A file for a fixed number of images takes no fewer: the last batch is filled up from the start.
            parts.append(run(images.take(range(start, start + batch), axis=0, mode="wrap")))
        answers = np.concatenate(parts)[: len(images)]
        if answers.shape != expected.shape:
            raise ValueError(f"its output is {answers.shape}, and the model's {expected.shape}")
        difference = np.maximum(difference, np.abs(answers - expected).max())  # not-a-number stays one
        same &= answers.reshape(len(images), -1).argmax(1) == expected.reshape(len(images), -1).argmax(1)
    return float(difference / np.abs(expected).max()), int(same.sum())
