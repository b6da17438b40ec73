"""The models of the page, loaded on demand, and their answers to an image."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from PIL import Image
from timm.data import create_transform

from res2net_zoo import catalog
from res2net_zoo.analysis import cam
from res2net_zoo.data.labels import class_names
from res2net_zoo.data.preprocessing import color_mode, data_config
from res2net_zoo.inference.forward import Forward, create_forward
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.weights.pretrained import create_model

if TYPE_CHECKING:
    from accelerate import Accelerator

RES2NET = "res2net50_26w_4s.in1k"
RESNET = "resnet50.tv_in1k"  # trained like the ResNet-50 of the paper's Figure 4
KEPT = 4  # models in memory
PROBE = 4  # seconds to wait for the Hub before it counts as not reachable


class WeightsUnreachableError(InputError):
    """Weights that are neither in the cache nor can be fetched."""


@dataclass(frozen=True)
class Answer:
    """The answer of a model to an image.

    Attributes:
        scores: Softmax scores of the five likeliest classes by name, the likeliest first.
        picture: The model's input without normalization, (H, W, 3) from 0 to 1.
        heat: Activation map of the likeliest class, (H, W) from 0 to 1.
        milliseconds: Time of the forward pass of one image.
        backend: What ran it: `torch`, or a backend of `optimize`.
    """

    scores: dict[str, float]
    picture: np.ndarray
    heat: np.ndarray
    milliseconds: float
    backend: str


@dataclass
class Classifier:
    """A loaded model.

    Attributes:
        model: The timm model, in eval mode.
        names: Its class names, each once.
        transform: Its evaluation transform.
        mode: PIL mode of its images.
        forward: Its forward pass.
        lock: Held while it runs: hooks that record its features must not see another user's image.
    """

    model: Any
    names: list[str]
    transform: Callable[[Image.Image], torch.Tensor]
    mode: str
    forward: Forward
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, picture: Image.Image) -> Answer:
        """Classify an image.

        Args:
            picture: The image, in `mode`.
        """
        device = next(self.model.parameters()).device
        image = self.transform(picture)[None].to(device)
        with self.lock:
            start = time.perf_counter()
            with torch.inference_mode():
                logits = self.forward.call(image).float().cpu()
            milliseconds = 1000 * (time.perf_counter() - start)
            best = logits.softmax(1)[0].topk(min(5, logits.shape[1]))
            heat, _ = cam.activation_maps(self.model, image, [int(best.indices[0])])
        scores = {self.names[i]: float(score) for score, i in zip(best.values, best.indices, strict=True)}
        return Answer(scores, cam.picture(self.model, image), heat[0], milliseconds, self.forward.backend)


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.classifier: Classifier | None = None


class Models:
    """The models that the page offers; those used last are kept in memory.

    Args:
        accelerator: Determines device and precision.
        backend: `torch`, or a backend of `optimize`.
        shipped: Name of the shipped model, which works without a network.
        others: Names of further models of the user.

    Attributes:
        names: The models that can be loaded, by name.
        shipped: Name of the shipped model.
        first: The two models that the page shows first.
    """

    def __init__(self, accelerator: "Accelerator", backend: str, shipped: str, others: Sequence[str] = ()) -> None:
        self.accelerator = accelerator
        self.backend = backend
        self.shipped = shipped
        classifiers = [c.name for c in catalog.load().checkpoints.values() if c.num_classes]
        self.names = list(dict.fromkeys([*others, shipped, *classifiers, RESNET]))
        self.first = (others[0], others[1] if len(others) > 1 else None) if others else (RES2NET, RESNET)
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._lock = threading.Lock()
        self._offline = threading.Lock()

    def load(self, name: str) -> Classifier:
        """Return a model; the first time, its weights are fetched.

        Raises:
            WeightsUnreachableError: Its weights cannot be fetched.
            InputError: The page does not offer it, or it cannot be loaded.
        """
        if name not in self.names:
            raise InputError(f"The page does not offer {name}.")
        with self._lock:
            slot = self._slots.setdefault(name, _Slot())
            self._slots.move_to_end(name)
            while len(self._slots) > KEPT:
                self._slots.popitem(last=False)
        with slot.lock:  # two users fetch the same weights once
            if slot.classifier is None:
                slot.classifier = self._create(name)
        return slot.classifier

    def _create(self, name: str) -> Classifier:
        local = name.startswith("local-dir:")
        reachable = local or hub_is_reachable()
        try:
            if reachable:
                model: Any = create_model(name)
            else:
                with self._offline, offline():
                    model = create_model(name)
        except InputError as error:
            if local:
                raise
            reason = one_line(error) if reachable else "the Hub is not reachable"
            raise WeightsUnreachableError(f"The weights of {name} cannot be fetched: {reason}.") from error
        if not model.num_classes:
            raise InputError(f"{name} lacks a classifier.")
        model = model.eval().to(self.accelerator.device, memory_format=torch.channels_last)
        config = data_config(model)
        forward = create_forward(model, self.backend, self.accelerator, 1)
        with torch.inference_mode():  # the first call is slower
            forward.call(torch.zeros(1, *config["input_size"], device=self.accelerator.device))
        transform = create_transform(**config, is_training=False)
        return Classifier(model, distinct(class_names(model)), transform, color_mode(config), forward)


def distinct(names: Sequence[str]) -> list[str]:
    """Return class names with the index added to those that several classes have."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def hub_is_reachable() -> bool:
    """Return whether the Hub answers within seconds; the client itself retries for minutes."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE)
    except (HTTPError, OfflineModeIsEnabled, OSError):
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """Let huggingface_hub read only its cache inside the context."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def call_of(name: str, pretrained: bool = True) -> str:
    """Return the Python code that creates a model and classifies an image as the page does."""
    weights = ", pretrained=True" if pretrained else ""
    return f"""\
import timm
import res2net_zoo  # registers the models
from PIL import Image, ImageOps

model = timm.create_model("{name}"{weights}).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
scores = model(transform(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB"))[None]).softmax(1)[0]
"""
