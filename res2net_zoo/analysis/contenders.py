"""The contenders of `scripts/benchmark.py`: our models, timm's models of the same names, and timm's ResNet-50.

Each runs with the fastest settings available to a user. All contenders of a setting get the same images, (N, C, H, W)
float32, and the same number of threads, and return float32 logits; conversions in between are part of the timing.
"""

import contextlib
import ctypes
import gc
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import timm.models.dla
import timm.models.res2net
import torch
from torch import nn
from torch.nn import functional as F

from res2net_zoo.analysis.cost import count
from res2net_zoo.inference import backends
from res2net_zoo.inference.export import (
    EXPORT,
    INPUT,
    import_openvino,
    openvino_core,
    openvino_settings,
    run_onnx,
    to_onnx,
)
from res2net_zoo.inference.optimization import uses_tf32
from res2net_zoo.inference.quantization import MINIMUM, quantize_onnx, quantize_openvino
from res2net_zoo.kernels.training import accelerate_training
from res2net_zoo.utils.errors import InputError, first_line
from res2net_zoo.utils.packages import require
from res2net_zoo.utils.private_apis import fail_at_recompile_limit
from res2net_zoo.weights.pretrained import create_model

OURS, TIMM, PLAIN, RESNET50, PRODUCT = "ours", "timm", "plain", "resnet50", "matrix product"
# Maximum difference from the float32 model's logits, relative to the largest logit. Half precision has 3 decimals,
# some of which a deep network loses, and more in training because of BatchNorm; int8 has 2.
TOLERANCE = {"infer": {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1, "int8": 0.25}, "train": {"float32": 1e-2}}
TF32_TOLERANCE = {"infer": 2e-2, "train": 0.1}  # for float32 if convolutions use TF32

Call = Callable[[], torch.Tensor]


class Skipped(Exception):
    """A contender cannot run here, or computes wrong results; the message gives the reason."""


@dataclass(frozen=True)
class Setting:
    """The computation to time.

    Attributes:
        model: Name as for `timm.create_model`; weights are random.
        batch_size: Images per batch.
        precision: `float32`, `bfloat16`, `float16`, or `int8` for inference on a CPU.
        mode: `infer`, or `train` for a training step.
        input_size: Channels, height and width of the images.
        threads: Number of CPU threads.
        device: Name of the device.
        matrix: Rows and columns of the matrices whose product measures the machine's peak.
    """

    model: str
    batch_size: int
    precision: str
    mode: str
    input_size: tuple[int, int, int]
    threads: int
    device: str = "cpu"
    matrix: int = 2048

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size[1:]))
        return f"{self.model}, {self.mode}, {self.precision}, batch {self.batch_size}, {size}"


@dataclass(frozen=True)
class Contender:
    """A model and the backend that runs it.

    Attributes:
        who: `ours`; `timm` for timm's model of the same name, or `plain` for our model without optimizations if timm
            has none; `resnet50` for timm's ResNet-50; or `matrix product`.
        how: Name of the backend.
    """

    who: str
    how: str

    def __str__(self) -> str:
        return f"{self.who} {self.how}"


@dataclass(frozen=True)
class Built:
    """A contender that is ready to run.

    Attributes:
        contender: The contender; for ours, with the selected backend.
        call: Processes a batch.
        error: Maximum difference of its logits from the float32 model's, relative to the largest logit.
    """

    contender: Contender
    call: Call
    error: float


def contenders(
    setting: Setting, backends: Sequence[str], peers: Sequence[str], against: Sequence[str]
) -> list[Contender]:
    """Return the contenders of a setting, ours first.

    Args:
        setting: The computation.
        backends: Our backends in inference, as for `res2net_zoo.optimize`.
        peers: Backends of the others; those that cannot train are skipped in training.
        against: Models to compare with: `timm`, `resnet50`.
    """
    training, half = setting.mode == "train", setting.precision in ("bfloat16", "float16")
    ways = []
    for peer in peers:
        if training or setting.device != "cpu":
            suited = ("eager", "inductor") if training else ("eager", "inductor", "cudagraphs")
            ways += [peer] if peer in suited else []
            continue
        if peer == "cudagraphs" or (setting.precision == "int8" and peer not in ("onnxruntime", "openvino")):
            continue
        ways.append(peer)
        if peer == "eager" and half:
            ways.append("eager autocast")  # in addition to a model entirely in half precision
        # With several streams, threads process different images of a batch.
        if peer == "openvino" and setting.threads > 1 and setting.batch_size % setting.threads == 0:
            ways.append("openvino streams")
    ours = [Contender(OURS, how) for how in ((ways or ["eager"]) if training else backends)]
    whose = {"timm": TIMM if _timm_model(_untouched_model(OURS, setting)) else PLAIN, "resnet50": RESNET50}
    products = ["torch"] if setting.precision != "int8" else []
    if setting.device == "cpu" and find_spec("openvino") and (products or find_spec("nncf")):
        products.append("openvino")
    return [
        *ours,
        *(Contender(whose[name], how) for name in against for how in ways),
        *(Contender(PRODUCT, how) for how in products),
    ]


def build(contender: Contender, setting: Setting, folder: Path) -> Built:
    """Build a contender, run it once, and check its results.

    Args:
        contender: The contender.
        setting: The computation.
        folder: Folder for exported models, which other processes reuse.

    Raises:
        Skipped: The contender is unavailable, fails, or computes wrong results.
    """
    try:
        with _suppress_output():
            if contender.who == PRODUCT:
                return Built(contender, _product(contender.how, setting), 0.0)
            model = make_model(contender.who, setting).to(setting.device)
            images = make_images(setting)
            with torch.no_grad():
                expected = model(images)
            if setting.mode == "train":
                call = _training(model, images, setting.precision, compiled=contender.how == "inductor")
            elif contender.who == OURS:
                contender, call = _optimized(model, images, setting, contender)
            else:
                way, _, variant = contender.how.partition(" ")
                file = folder / str(contender).replace(" ", "-")
                call = INFERENCE[way](model, images, setting, variant, file)
            off = ((call() - expected).abs().max() / expected.abs().max()).item()
    except (Skipped, InputError) as error:
        raise Skipped(f"{contender}: {error}") from error
    except Exception as error:  # compilers and runtimes raise any type; the other contenders continue
        raise Skipped(f"{contender} fails: {first_line(error)}") from error
    allowed = TOLERANCE[setting.mode].get(setting.precision, math.inf)
    if setting.precision == "float32" and uses_tf32(images.device):
        allowed = TF32_TOLERANCE[setting.mode]
    if not off <= allowed:
        raise Skipped(f"{contender} computes wrong results: its logits differ by {off:.2g} of the largest")
    return Built(contender, call, off)


def cost(contender: Contender, setting: Setting) -> tuple[int, int]:
    """Return the multiply-accumulates of a contender's call, and its number of parameters."""
    if contender.who == PRODUCT:
        return setting.matrix**3, 0
    parameters, macs = count(
        lambda: _untouched_model(contender.who, setting), setting.input_size, setting.mode == "train"
    )
    return macs * setting.batch_size, parameters


def make_images(setting: Setting) -> torch.Tensor:
    """Return a random batch (N, C, H, W) of float32; in int8 like the calibration images."""
    generator = torch.Generator().manual_seed(0)
    if setting.precision == "int8":
        return calibration_images(setting, setting.batch_size)
    return torch.randn(setting.batch_size, *setting.input_size, generator=generator).to(setting.device)


def calibration_images(setting: Setting, number: int = MINIMUM) -> torch.Tensor:
    """Return smooth random images (N, C, H, W) of float32, with detail of several sizes as in photographs."""
    generator = torch.Generator().manual_seed(0)
    channels, *size = setting.input_size
    images = torch.zeros(number, channels, *size)
    for cells in (2, 4, 8, 16):
        detail = torch.randn(number, channels, cells, cells, generator=generator)
        images += F.interpolate(detail, tuple(size), mode="bilinear") / cells**0.5
    return images.clamp(-2, 2)  # about the range of ImageNet's normalization


def make_model(who: str, setting: Setting) -> nn.Module:
    """Return a contender's model in the mode of the setting; ours and timm's have the same weights."""
    torch.manual_seed(0)
    model = _untouched_model(who, setting)
    twin = _timm_model(model) if who == OURS else None
    with torch.no_grad():
        for parameter in (twin or model).parameters():
            if parameter.ndim == 1:
                # timm initializes residual branches to return 0, but all parts must affect the logits here.
                parameter.uniform_(0.4, 0.8)
    if twin is not None:
        model.load_state_dict(twin.state_dict())
    return model.train(setting.mode == "train")


def _untouched_model(who: str, setting: Setting) -> nn.Module:
    ours: Any = create_model(setting.model, pretrained=False)
    if who == RESNET50:
        return timm.create_model("resnet50", in_chans=setting.input_size[0], num_classes=ours.num_classes)
    return (_timm_model(ours) or ours) if who == TIMM else ours


def _timm_model(ours: Any) -> nn.Module | None:
    """Return timm's model of the same architecture, which ours replaces in the registry, or None."""
    architecture = ours.pretrained_cfg["architecture"]
    for module in (timm.models.res2net, timm.models.dla):
        if hasattr(module, architecture):
            return getattr(module, architecture)(num_classes=ours.num_classes)
    return None


@contextlib.contextmanager
def _suppress_output() -> Iterator[None]:
    """Suppress the output and the warnings of compilers and runtimes."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _optimized(
    model: nn.Module, images: torch.Tensor, setting: Setting, contender: Contender
) -> tuple[Contender, Call]:
    from res2net_zoo.inference.optimization import candidates, optimize

    precision: Any = setting.precision
    calibration = calibration_images(setting) if precision == "int8" else None
    if contender.how not in ("auto", *candidates(images.device, precision, slow=True)):
        raise Skipped(f"the backend is unavailable on this machine for {images.device.type} and {precision}")
    how: Any = contender.how
    optimized = optimize(model, images, precision, how, calibration, refresh=True)
    if contender.how not in ("auto", optimized.backend):
        raise Skipped(f"it cannot run this model here; {optimized.backend} can")
    return replace(contender, how=optimized.backend), lambda: optimized(images)


def _eager(model: nn.Module, images: torch.Tensor, setting: Setting, variant: str, file: Path) -> Call:
    precision: Any = setting.precision
    autocast = variant == "autocast"
    run = backends.eager(model, images, "float32" if autocast else precision)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        with torch.autocast(images.device.type, getattr(torch, precision), enabled=autocast):
            return run(images).float()

    return call


def _inductor(model: Any, images: torch.Tensor, setting: Setting, variant: str, file: Path) -> Call:
    # By default, Dynamo silently falls back to eager at the recompile limit.
    fail_at_recompile_limit()
    dtype = getattr(torch, setting.precision)
    compiled = backends.compile_frozen(model.to(dtype=dtype, memory_format=torch.channels_last), images.device)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return compiled(images.to(dtype=dtype, memory_format=torch.channels_last)).float()

    return call


def _cudagraphs(model: nn.Module, images: torch.Tensor, setting: Setting, variant: str, file: Path) -> Call:
    run = backends.BACKENDS["cudagraphs"](model, images, setting.precision)
    return torch.inference_mode()(lambda: run(images).float())


def _onnxruntime(model: nn.Module, images: torch.Tensor, setting: Setting, variant: str, file: Path) -> Call:
    require(*EXPORT, "onnx", "onnxscript", "onnxruntime")
    if setting.precision not in ("float32", "int8"):
        raise Skipped(f"{setting.precision} convolutions are unsupported on CPUs")
    file = file.with_suffix(".onnx")
    if not file.exists() and setting.precision == "int8":
        quantized = quantize_onnx(to_onnx(model, images), calibration_images(setting))
        file.write_bytes(backends.resize_onnx(quantized, tuple(images.shape)).SerializeToString())
    elif not file.exists():
        torch.onnx.export(model, (images,), file, input_names=[INPUT], dynamo=True, verbose=False)
    run = run_onnx(file, torch.get_num_threads())
    return lambda: torch.from_numpy(run(images.numpy()))


def _openvino(model: nn.Module, images: torch.Tensor, setting: Setting, variant: str, file: Path) -> Call:
    ov = import_openvino()
    streams = torch.get_num_threads() if variant == "streams" else 1
    shares = images.chunk(streams)
    file = file.with_suffix(".xml")
    if not file.exists():
        converted = ov.convert_model(model, example_input=shares[0])
        if setting.precision == "int8":
            converted.reshape([1, *images.shape[1:]])
            converted = quantize_openvino(converted, calibration_images(setting))
        converted.reshape(list(shares[0].shape))  # static shapes are faster than dynamic ones
        ov.save_model(converted, file, compress_to_fp16=False)
    compiled = openvino_core().compile_model(file, "CPU", _openvino_settings(setting.precision, streams))
    requests = [compiled.create_infer_request() for _ in shares]

    def call() -> torch.Tensor:
        for request, share in zip(requests, shares, strict=True):
            request.start_async([share.numpy()], share_inputs=True)
        for request in requests:
            request.wait()
        return torch.from_numpy(requests[0].results[0]) if streams == 1 else torch.cat(
            [torch.from_numpy(request.results[0]) for request in requests]
        )  # fmt: skip

    return call


def _openvino_settings(precision: str, streams: int = 1) -> dict[str, Any]:
    hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "f32"}[precision]
    settings = openvino_settings(hint, torch.get_num_threads()) | {"NUM_STREAMS": streams}
    return settings if streams == 1 else settings | {"PERFORMANCE_HINT": "THROUGHPUT"}


INFERENCE: dict[str, Callable[[nn.Module, torch.Tensor, Setting, str, Path], Call]] = {
    "eager": _eager,
    "inductor": _inductor,
    "cudagraphs": _cudagraphs,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _training(model: nn.Module, images: torch.Tensor, precision: str, compiled: bool) -> Call:
    """Return a training step: forward, loss, backward, SGD with momentum."""
    model = accelerate_training(model.to(memory_format=torch.channels_last))
    device, dtype = images.device.type, getattr(torch, precision)
    # The learning rate is too small to change results over the steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=precision == "float16")
    run: Any = torch.compile(model) if compiled else model
    labels = torch.zeros(len(images), dtype=torch.long, device=device)

    def call() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=precision != "float32"):
            logits = run(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return logits.detach().float()

    return call


def _product(how: str, setting: Setting) -> Call:
    """Return a call that multiplies two square matrices with the library `how`, in its fastest settings."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(setting.matrix, setting.matrix, generator=generator) for _ in range(2))
    if how == "torch":
        a, b = (x.to(setting.device, getattr(torch, setting.precision)) for x in (a, b))
        return partial(_matrix_product, a, b)
    import numpy as np

    ov = import_openvino()
    op = ov.opset13
    parameter = op.parameter([1, *a.shape], np.float32)
    # The second matrix is constant, like the weights of a layer.
    product = op.matmul(parameter, op.constant(b.numpy()), False, True)
    model = ov.Model([product], [parameter])
    if setting.precision == "int8":
        model = quantize_openvino(model, a[None])
    compiled = openvino_core().compile_model(model, "CPU", _openvino_settings(setting.precision))
    request = compiled.create_infer_request()
    return lambda: torch.from_numpy(request.infer([a[None].numpy()], share_inputs=True, share_outputs=True)[0])


@torch.inference_mode()
def _matrix_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.device.type == "cpu":
        return a @ b
    # TF32 is enabled by default for convolutions, but not for matrix products. The setting is restored, because
    # torch.compile recompiles models when it changes.
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        return a @ b
    finally:
        settings.allow_tf32 = before


def peak_memory(contender: Contender, setting: Setting, folder: Path) -> float | None:
    """Measure the memory of a contender in a separate process.

    Args:
        contender: The contender; not `auto`, which builds several backends.
        setting: The computation.
        folder: The folder of an earlier call of `build`, so that exporting a model is not measured.

    Returns:
        Megabytes (2**20). On a CPU: the peak of resident memory while it runs, minus that of the process before the
        model was built, so it covers libraries, weights and activations; None if the system does not provide it.
        On a GPU: the peak of memory reserved by torch while it runs.

    Raises:
        Skipped: The contender cannot run, or its process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_memory_of_process, contender, setting, folder).result()
        except Skipped:
            raise
        except Exception as error:
            raise Skipped(f"{contender} fails in a separate process: {error}") from error


def _memory_of_process(contender: Contender, setting: Setting, folder: Path) -> float | None:
    torch.set_num_threads(setting.threads)
    before = _resident("VmRSS")
    call = build(contender, setting, folder).call
    gc.collect()
    if setting.device != "cpu":
        torch.cuda.empty_cache()  # release memory that was needed only for building
        torch.cuda.reset_peak_memory_stats()
    elif before is None:
        return None
    else:
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # release memory that was needed only for building
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    for _ in range(3):
        call()
    if setting.device != "cpu":
        # Not the allocated memory: intermediate results of a CUDA graph are not allocated while it runs.
        return torch.cuda.max_memory_reserved() / 2**20
    peak = _resident("VmHWM")
    return None if peak is None or before is None else peak - before


def _resident(field: str) -> float | None:
    """Return a field of this process's memory status in megabytes, or None if unavailable."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
