"""Who runs in `scripts/benchmark.py`: our models, timm's own and its ResNet-50, each as fast as a user can have it.

Every contender of a setting gets the same images, (N, C, H, W) float32 as a loader gives them, and the
same number of threads, and returns float32 logits; what it does to them in between is part of its time.
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
from res2net_zoo.inference.export import INPUT, import_openvino, openvino_core, openvino_settings, require, run_onnx
from res2net_zoo.kernels.training import accelerate_training
from res2net_zoo.utils.errors import InputError, first_line
from res2net_zoo.utils.private_apis import fail_at_recompile_limit
from res2net_zoo.weights.pretrained import create_model

OURS, TIMM, PLAIN, RESNET50, PRODUCT = "ours", "timm", "plain", "resnet50", "matrix product"
PEERS = ("eager", "inductor", "onnxruntime", "openvino")
# Largest difference from the model's own logits in float32, relative to the largest of them. A deep
# network loses some of the 3 decimals of half precision; in training its BatchNorms lose more.
TOLERANCE = {"infer": {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}, "train": {"float32": 1e-2}}

Call = Callable[[], torch.Tensor]


class LeftOut(Exception):
    """A contender cannot run here, or does not compute what it should; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What is computed.

    Attributes:
        model: What `timm.create_model` takes; its weights are random.
        batch_size: Images at a time.
        precision: `float32`, `bfloat16` or `float16`.
        mode: `infer`, or `train` for a step of training.
        input_size: Channels, height and width of the images.
        threads: Threads of a CPU.
        device: Where.
        matrix: Rows and columns of the matrices whose product shows the machine's peak.
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
    """Whose model, and what runs it.

    Attributes:
        who: `ours`; `timm`, for timm's own of the same name, or `plain` where timm has none and our
            model stands in for it, untouched; `resnet50`, for timm's; or `matrix product`.
        how: What runs it.
    """

    who: str
    how: str

    def __str__(self) -> str:
        return f"{self.who} {self.how}"


@dataclass(frozen=True)
class Built:
    """A contender that is ready.

    Attributes:
        contender: Of ours, with what was chosen to run it.
        call: Does the work of a batch.
        error: Largest difference of its logits from the model's own in float32, relative to the largest.
    """

    contender: Contender
    call: Call
    error: float


def contenders(
    setting: Setting, backends: Sequence[str], peers: Sequence[str], against: Sequence[str]
) -> list[Contender]:
    """Return who runs in a setting, ours first.

    Args:
        setting: What is computed.
        backends: What runs ours in inference, as `res2net_zoo.optimize` takes it.
        peers: What runs the others; training leaves out those that cannot train.
        against: Who these are: `timm`, `resnet50`.
    """
    training, half = setting.mode == "train", setting.precision != "float32"
    ways = []
    for peer in peers:
        if training or setting.device != "cpu":
            ways += [peer] if peer in ("eager", "inductor") else []
            continue
        ways.append(peer)
        if peer == "eager" and half:
            ways.append("eager autocast")  # beside a model of half precision altogether
        # Several streams share out a batch among the threads in place of each image.
        if peer == "openvino" and setting.threads > 1 and setting.batch_size % setting.threads == 0:
            ways.append("openvino streams")
    ours = [Contender(OURS, how) for how in ((ways or ["eager"]) if training else backends)]
    whose = {"timm": TIMM if _timms(_bare(OURS, setting)) else PLAIN, "resnet50": RESNET50}
    products = [how for how in ("torch", "openvino") if how == "torch" or (find_spec(how) and setting.device == "cpu")]
    return [
        *ours,
        *(Contender(whose[name], how) for name in against for how in ways),
        *(Contender(PRODUCT, how) for how in products),
    ]


def build(contender: Contender, setting: Setting, folder: Path) -> Built:
    """Make a contender, run it once, and see that it computes what its model does.

    Args:
        contender: Whose model, and what runs it.
        setting: What is computed.
        folder: Where files for runtimes are kept, for another process to load in place of making them.

    Raises:
        LeftOut: It cannot be had here, fails, or computes something else.
    """
    try:
        with _quietly():
            if contender.who == PRODUCT:
                return Built(contender, _product(contender.how, setting), 0.0)
            model = make_model(contender.who, setting).to(setting.device)
            images = make_images(setting)
            with torch.no_grad():
                expected = model(images)
            if setting.mode == "train":
                call = _training(model, images, setting.precision, compiled=contender.how == "inductor")
            elif contender.who == OURS:
                contender, call = _optimized(model, images, setting.precision, contender)
            else:
                way, _, variant = contender.how.partition(" ")
                file = folder / str(contender).replace(" ", "-")
                call = INFERENCE[way](model, images, setting.precision, variant, file)
            off = ((call() - expected).abs().max() / expected.abs().max()).item()
    except (LeftOut, InputError) as error:
        raise LeftOut(f"{contender}: {error}") from error
    except Exception as error:  # compilers and runtimes can fail in any way; the others run on
        raise LeftOut(f"{contender} fails: {first_line(error)}") from error
    if not off <= TOLERANCE[setting.mode].get(setting.precision, math.inf):
        raise LeftOut(f"{contender} computes something else: its logits are off by {off:.2g} of the largest")
    return Built(contender, call, off)


def cost(contender: Contender, setting: Setting) -> tuple[int, int]:
    """Return the multiply-accumulates of a contender's call, and its number of parameters."""
    if contender.who == PRODUCT:
        return setting.matrix**3, 0
    parameters, macs = count(lambda: _bare(contender.who, setting), setting.input_size, setting.mode == "train")
    return macs * setting.batch_size, parameters


def make_images(setting: Setting) -> torch.Tensor:
    """Return a batch, (N, C, H, W) float32."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(setting.batch_size, *setting.input_size, generator=generator).to(setting.device)


def make_model(who: str, setting: Setting) -> nn.Module:
    """Return a contender's model in the mode of the setting, with the same weights for ours and timm's."""
    torch.manual_seed(0)
    model = _bare(who, setting)
    twin = _timms(model) if who == OURS else None
    with torch.no_grad():
        for parameter in (twin or model).parameters():
            if parameter.ndim == 1:
                # timm begins with residual branches that give zeros; every part is to matter here.
                parameter.uniform_(0.4, 0.8)
    if twin is not None:
        model.load_state_dict(twin.state_dict())
    return model.train(setting.mode == "train")


def _bare(who: str, setting: Setting) -> nn.Module:
    ours: Any = create_model(setting.model, pretrained=False)
    if who == RESNET50:
        return timm.create_model("resnet50", in_chans=setting.input_size[0], num_classes=ours.num_classes)
    return (_timms(ours) or ours) if who == TIMM else ours


def _timms(ours: Any) -> nn.Module | None:
    """Return the model that stood in timm's registry before ours took its place, where there was one."""
    architecture = ours.pretrained_cfg["architecture"]
    for module in (timm.models.res2net, timm.models.dla):
        if hasattr(module, architecture):
            return getattr(module, architecture)(num_classes=ours.num_classes)
    return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what compilers and runtimes say on the way out of the output; what fails is told in one line."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _optimized(model: nn.Module, images: torch.Tensor, precision: Any, contender: Contender) -> tuple[Contender, Call]:
    from res2net_zoo.inference.optimization import candidates, optimize

    if contender.how not in ("auto", "inductor", *candidates(images.device)):
        raise LeftOut(f"this machine has no such backend for a {images.device.type}")
    optimized = optimize(model, images, precision, backend=contender.how)  # type: ignore[arg-type]
    if contender.how not in ("auto", optimized.backend):
        raise LeftOut(f"it cannot run this model here; {optimized.backend} would")
    return replace(contender, how=optimized.backend), lambda: optimized(images)


def _eager(model: nn.Module, images: torch.Tensor, precision: Any, variant: str, file: Path) -> Call:
    autocast = variant == "autocast"
    run = backends.eager(model, images, "float32" if autocast else precision)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        with torch.autocast(images.device.type, getattr(torch, precision), enabled=autocast):
            return run(images).float()

    return call


def _inductor(model: Any, images: torch.Tensor, precision: str, variant: str, file: Path) -> Call:
    # At its limit Dynamo would quietly run what it should compile.
    fail_at_recompile_limit()
    dtype = getattr(torch, precision)
    compiled = backends.compile_frozen(model.to(dtype=dtype, memory_format=torch.channels_last), images.device)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return compiled(images.to(dtype=dtype, memory_format=torch.channels_last)).float()

    return call


def _onnxruntime(model: nn.Module, images: torch.Tensor, precision: str, variant: str, file: Path) -> Call:
    require("onnx", "onnxscript", "onnxruntime")
    if precision != "float32":
        raise LeftOut(f"it has no {precision} convolutions on CPUs")
    file = file.with_suffix(".onnx")
    if not file.exists():
        torch.onnx.export(model, (images,), file, input_names=[INPUT], dynamo=True, verbose=False)
    run = run_onnx(file, torch.get_num_threads())
    return lambda: torch.from_numpy(run(images.numpy()))


def _openvino(model: nn.Module, images: torch.Tensor, precision: str, variant: str, file: Path) -> Call:
    ov = import_openvino()
    streams = torch.get_num_threads() if variant == "streams" else 1
    shares = images.chunk(streams)
    file = file.with_suffix(".xml")
    if not file.exists():
        converted = ov.convert_model(model, example_input=shares[0])
        converted.reshape(list(shares[0].shape))  # shapes known beforehand are faster than dynamic ones
        ov.save_model(converted, file, compress_to_fp16=False)
    compiled = openvino_core().compile_model(file, "CPU", _openvino_settings(precision, streams))
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
    hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[precision]
    settings = openvino_settings(hint, torch.get_num_threads()) | {"NUM_STREAMS": streams}
    return settings if streams == 1 else settings | {"PERFORMANCE_HINT": "THROUGHPUT"}


INFERENCE: dict[str, Callable[[nn.Module, torch.Tensor, str, str, Path], Call]] = {
    "eager": _eager,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _training(model: nn.Module, images: torch.Tensor, precision: str, compiled: bool) -> Call:
    """Return a step of training: forward, loss, backward, SGD with momentum."""
    model = accelerate_training(model.to(memory_format=torch.channels_last))
    device, dtype = images.device.type, getattr(torch, precision)
    # So small a rate that the numbers stay as they are for any number of steps.
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
    """Return a product of two square matrices, as the library `how` computes it fastest."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(setting.matrix, setting.matrix, generator=generator) for _ in range(2))
    if how == "torch":
        a, b = (x.to(setting.device, getattr(torch, setting.precision)) for x in (a, b))
        if setting.device != "cpu":
            # Convolutions have it unless they are told not to, products unless they are told to.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        return torch.inference_mode()(lambda: a @ b)
    import numpy as np

    ov = import_openvino()
    op = ov.opset13
    parameter = op.parameter(list(a.shape), np.float32)
    # Its second matrix is known beforehand, as a layer's weights are.
    product = op.matmul(parameter, op.constant(b.numpy()), False, True)
    model = ov.Model([product], [parameter])
    compiled = openvino_core().compile_model(model, "CPU", _openvino_settings(setting.precision))
    request = compiled.create_infer_request()
    return lambda: torch.from_numpy(request.infer([a.numpy()], share_inputs=True, share_outputs=True)[0])


def peak_memory(contender: Contender, setting: Setting, folder: Path) -> float | None:
    """Measure what a contender takes, in a process that it has to itself.

    Args:
        contender: Whose model, and what runs it; of ours not `auto`, which makes several.
        setting: What is computed.
        folder: What `build` was given before, so that exporting a model is not in it.

    Returns:
        Megabytes (2**20). On a CPU: the most memory that was resident while it ran, less that of the
        process before the model was made, so libraries that it loads, weights and activations; None
        where the system does not tell. On a GPU: the most that torch had allocated while it ran.

    Raises:
        LeftOut: It cannot run, or its process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_own_memory, contender, setting, folder).result()
        except LeftOut:
            raise
        except Exception as error:
            raise LeftOut(f"{contender} has no process of its own: {error}") from error


def _own_memory(contender: Contender, setting: Setting, folder: Path) -> float | None:
    torch.set_num_threads(setting.threads)
    before = _resident("VmRSS")
    call = build(contender, setting, folder).call
    gc.collect()
    if setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif before is None:
        return None
    else:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)  # what was needed only to build it
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(3):
        call()
    if setting.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = _resident("VmHWM")
    return None if peak is None or before is None else peak - before


def _resident(field: str) -> float | None:
    """Return a figure of this process's memory in megabytes, where the system tells it."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
