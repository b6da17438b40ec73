"""A model for a task: a backbone of the zoo and a head, as a folder that goes to the Hub and comes back."""

import importlib.util
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from res2net_zoo.training.optimization import freeze
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import finish_replacing
from res2net_zoo.weights import model_config
from res2net_zoo.weights.convert import explain
from res2net_zoo.weights.model_folder import replaced_folder, write_backbone
from res2net_zoo.weights.model_names import parse_name
from res2net_zoo.weights.originals import save_weights
from res2net_zoo.weights.pretrained import create_model
from res2net_zoo.weights.provenance import KEY, Provenance, of_folder, of_model

Figures = dict[str, float]

# What is raised of a file that cannot be read, of a damaged image, or of one that would fill the memory.
NO_IMAGE = (InputError, OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def reason(error: BaseException, path: Path) -> str:
    """Return why a file cannot be read, without its name, for a message that has it already."""
    return str(error).removeprefix(f"cannot read {path}: ") or type(error).__name__


class Annotated(Dataset, ABC):
    """Images and what is known of them. Opening one checks all annotations; images are read one by one.

    Attributes:
        classes: Name of each class.
        samples: What its samples are.
    """

    classes: list[str]
    samples: ClassVar[str] = "images"

    def remarks(self) -> dict[str, str]:
        """Return what the figures of these data must be read with, for the card and the results, by a short name."""
        return {}

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def __getitem__(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        """Return an image in RGB, upright, and what is known of it."""

    @abstractmethod
    def path(self, i: int) -> Path:
        """Return an image's file."""


class Score(ABC):
    """The figures of an evaluation, exact on any number of processes.

    Each process tells of its own images; `compute` is called by all of them and returns the same in all.
    """

    @abstractmethod
    def update(self, i: int, target: dict[str, Any], prediction: Any) -> None:
        """Take note of what a model said of image `i`."""

    @abstractmethod
    def compute(self, accelerator: Accelerator) -> Figures:
        """Return the figures, by the names that the paper's tables use."""

    def details(self) -> dict[str, Any]:
        """Return what else the results tell beside the figures; after `compute`."""
        return {}

    def results(self) -> list[dict[str, Any]]:
        """Return what was found in the images of all processes, in COCO's format of results; after `compute`.

        Raises:
            InputError: The format has nothing for this task.
        """
        raise InputError("COCO's format of results is for detection and keypoints")


class TaskModel(nn.Module, ABC):
    """A backbone of the zoo with a task's head.

    Args:
        model: What `timm.create_model` takes: the backbone.
        classes: Name of each class that is told apart.
        head: One of the task's `heads`; default the first.
        img_size: Length of an image's side in training and evaluation, in pixels; default the task's.
        output_stride: Of the backbone, where the head can have another than 32.
        mean: Of the images' channels, from 0 to 1; default the backbone's. So with `std`.
        std: Their standard deviation.
        head_kwargs: More for the network that `build` makes, by its library's names.
        pretrained: Whether to load the backbone's weights.

    Attributes:
        settings: All of these, by which the model is built again; `model` is the architecture.
        network: Backbone and head.
        origin: Where its weights come from.
        scales: From which to which factor images are scaled for training; None where the task does not.

    Raises:
        InputError: No such head, or no such backbone or `head_kwargs` for it.
    """

    task: ClassVar[str]
    hub_task: ClassVar[str]  # the Hub's name
    heads: ClassVar[tuple[str, ...]]
    img_size: ClassVar[int]  # the default
    scales: tuple[float, float] | None = None
    best: ClassVar[str]  # the figure by which the best epoch is chosen, of which more is better
    requires: ClassVar[dict[str, str]] = {}  # package by module
    extra: ClassVar[str] = "tasks"  # of ours, which has them
    less_is_better: ClassVar[frozenset[str]] = frozenset()  # figures that are errors
    threshold: ClassVar[float | None] = None  # lowest score of what is drawn; None where predictions have no scores
    tolerance: ClassVar[float] = 0.05  # half of the last digit that the paper prints of its figures
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: str,
        classes: Sequence[str],
        head: str | None = None,
        img_size: int | None = None,
        output_stride: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.check_installed()
        head = self.heads[0] if head is None else head
        if head not in self.heads:
            raise InputError(f"{self.task} has no head {head}; there are {', '.join(self.heads)}")
        options: dict[str, Any] = {} if output_stride is None else {"output_stride": output_stride}
        features: Any = create_model(model, pretrained, features_only=True, **options)
        config = features.pretrained_cfg
        self.origin: Provenance = of_model(model, config, pretrained)
        self.settings: dict[str, Any] = dict(
            model=config["architecture"],
            classes=list(classes),
            head=head,
            img_size=img_size or type(self).img_size,
            output_stride=output_stride,
            mean=list(config["mean"] if mean is None else mean),
            std=list(config["std"] if std is None else std),
            head_kwargs=dict(head_kwargs or {}),
        )
        with torch.device("meta"):
            whole: Any = create_model(self.settings["model"], False, num_classes=0)
        if missing := whole.state_dict().keys() - features.state_dict().keys():
            raise InputError(
                f"{model} cannot be the backbone of a task: timm's features of it are without {min(missing)}, "
                "so that what is trained would fit no such model"
            )
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.settings[key]).view(-1, 1, 1), persistent=False)
        if len(self.mean) != 3:
            raise InputError(f"{model} takes images of {len(self.mean)} channels; the tasks are on RGB")
        self._stay: list[nn.Module] = []
        try:
            self.network = self.build(features, **self.settings["head_kwargs"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            given = " ".join(f"{name}={value}" for name, value in self.settings["head_kwargs"].items())
            hint = f" with {given}; correct these" if given else ""
            # The messages of the other types are Python's own and do not help a user.
            reason = f": {error}" if type(error) in (RuntimeError, ValueError) else ""
            message = f"{head} cannot be built on {model}{hint}{reason}"
            raise InputError(message, *["head_kwargs"] * bool(given)) from error

    @classmethod
    def check_installed(cls) -> None:
        """Check that what the task needs is installed.

        Raises:
            InputError: It is not.
        """
        missing = [package for module, package in cls.requires.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise InputError(f"{cls.task} needs {' and '.join(missing)}; pip install 'res2net-zoo[{cls.extra}]'")

    @classmethod
    @abstractmethod
    def open(cls, data: str, split: str, head: str, classes: Sequence[str] | None = None) -> Annotated:
        """Open annotated images.

        Args:
            data: Where they are, in the format of the task.
            split: Which of its splits.
            head: The model's; some need to know more of an image than others.
            classes: What the classes must be, where a model is given; else those of the data.

        Raises:
            InputError: No such data, or annotations that cannot be right.
        """

    @classmethod
    def options(cls, data: Annotated, flip_pairs: Sequence[str] | None) -> dict[str, Any]:
        """Return what a model for these data needs beside their classes.

        Args:
            data: What it is to be trained on.
            flip_pairs: Joints that exchange their names in a mirror, as ONE:OTHER, or `none` alone.

        Raises:
            InputError: The task has no joints, or these are unclear.
        """
        if flip_pairs is not None:
            raise InputError(f"pairs of joints are for keypoints, not for {cls.task}", "flip_pairs")
        return {}

    def about(self) -> dict[str, str]:
        """Return what a reader should know of the model beside its settings, by a short name."""
        return {}

    @abstractmethod
    def build(self, features: Any, **kwargs: Any) -> nn.Module:
        """Build the network on a backbone, which is timm's `features_only` model."""

    @property
    @abstractmethod
    def features(self) -> nn.Module:
        """The backbone in the network."""

    @abstractmethod
    def transform(self, image: Image.Image, target: dict[str, Any], train: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """Turn an image and what is known of it into what `forward` takes; augmented if for training.

        What is random follows from the global random states of torch, numpy and Python. Loader processes call it,
        so it must not touch the model's tensors, which may be on a GPU.

        Returns:
            The image (3, H, W) from 0 to 1, and its target.
        """

    def collate(self, samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> tuple[Any, list[dict[str, Any]]]:
        """Make a batch of what `transform` returned; images stay apart, for in evaluation each has its own size."""
        return [image for image, _ in samples], [target for _, target in samples]

    @abstractmethod
    def forward(self, images: Any, targets: list[dict[str, Any]] | None = None) -> Any:
        """Return the losses by name in training; in evaluation, where no targets come, a prediction for each image."""

    @abstractmethod
    def score(self, data: Annotated) -> Score:
        """Return what collects the figures of an evaluation on `data`."""

    @abstractmethod
    def draw(self, image: Image.Image, prediction: Any, threshold: float | None = None) -> Image.Image:
        """Return the image with a prediction drawn on it.

        Args:
            image: The image, which stays as it is.
            prediction: What `forward` returned for it.
            threshold: Lowest score of what is drawn; None for the task's default.
        """

    @abstractmethod
    def describe(self, prediction: Any, threshold: float | None = None) -> list[dict[str, Any]]:
        """Return the objects of a prediction for JSON; coordinates are pixels of the image, boxes as COCO has them.

        Args:
            prediction: What `forward` returned for an image.
            threshold: Lowest score of an object; None for the task's default.
        """

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (..., 3, H, W) from 0 to 1 as the backbone takes them."""
        return (images - self.mean) / self.std

    def freeze(self, stages: str, batch_norm: bool) -> None:
        """Freeze the backbone's first stages.

        Args:
            stages: How many, the stem being the first, or `all`.
            batch_norm: Whether every BatchNorm of the backbone stays what it is, statistics and all.

        Raises:
            InputError: The backbone has fewer stages.
        """
        twin: Any = timm.create_model(self.settings["model"])
        freeze(twin, stages)
        frozen = {name for name, parameter in twin.named_parameters() if not parameter.requires_grad}
        modules = dict(self.features.named_modules())
        for name, parameter in self.features.named_parameters():
            owner = modules[name.rpartition(".")[0]]
            norm = isinstance(owner, nn.BatchNorm2d)
            if name in frozen or (batch_norm and norm):
                parameter.requires_grad_(False)
                if norm:
                    self._stay.append(owner)

    def train(self, mode: bool = True) -> "TaskModel":
        """Set training or evaluation; what is frozen stays in evaluation."""
        super().train(mode)
        for module in self._stay:
            module.eval()
        return self

    def save(self, folder: Path, card: ModelCard) -> None:
        """Write the model as a folder, which `load` and the Hub read.

        The folder is at any moment the old one or the new one, whole. In it `backbone` is a folder of its
        own, which timm reads as `local-dir:FOLDER/backbone`: a start for any other task.

        Args:
            folder: Where to write it.
            card: Its card.
        """
        with replaced_folder(folder) as new:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            save_weights(tensors, new / WEIGHTS, {})
            config = {"library_name": "res2net-zoo", "task": self.task, **self.settings, KEY: self.origin.to_dict()}
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            card.save(new / "README.md")
            preprocessing = {key: tuple(self.settings[key]) for key in ("mean", "std")}
            write_backbone(
                new / "backbone", self.settings["model"], self.features.state_dict(), preprocessing, self.origin
            )


def check_options(network: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check options for a network by its parameters: many a library's takes unknown names without a word.

    Raises:
        InputError: It has none of that name, or it is a number there and none here.
    """
    known = {
        name: option for name, option in signature(network).parameters.items() if option.kind != option.VAR_KEYWORD
    }
    for name, value in options.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
            raise InputError(f"{network.__name__} has no option {name}; {hint}")
        if isinstance(known[name].default, int | float) and not isinstance(value, int | float):
            raise InputError(f"{network.__name__}'s {name} is a number, such as {known[name].default}, not {value}")


def find_folder(name: str) -> Path:
    """Return the folder of a task's model: a path, `local-dir:DIR`, or `hf-hub:ORG/NAME`, which is downloaded.

    Raises:
        InputError: There is none.
    """
    source, identifier = parse_name(name if ":" in name else f"local-dir:{name}")
    if source == "local-dir":
        if not Path(identifier).is_dir():
            finish_replacing(Path(identifier))
        if not (Path(identifier) / "config.json").is_file():
            raise InputError(
                f"{identifier} is not a model folder, for it has no config.json; training on a task writes one"
            )
        return Path(identifier)
    repository, _, revision = identifier.partition("@")
    try:
        files = ["config.json", WEIGHTS, "README.md"]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except LocalEntryNotFoundError as error:
        raise InputError(f"the Hub is out of reach and {repository} is not in its cache") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"cannot read {repository} from the Hub: {error}") from error


def load_settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the task of a model folder and the settings that build its model.

    Raises:
        InputError: It is no such folder.
    """
    from res2net_zoo.tasks import TASKS

    try:
        config = model_config.read_task(folder / "config.json")
    except InputError as error:
        raise InputError(f"{folder} is no folder of a task's model: {error}") from error
    task = config.pop("task")
    for key in ("library_name", KEY):
        config.pop(key, None)
    if task not in TASKS:
        raise InputError(f"{folder} is of the task {task}, which is not known here; there are {', '.join(TASKS)}")
    return task, config


def load(name: str) -> TaskModel:
    """Load a task's model with its weights, in evaluation mode.

    Args:
        name: A folder's path, `local-dir:DIR`, or `hf-hub:ORG/NAME`.

    Raises:
        InputError: There is none, or it is damaged.
    """
    from res2net_zoo.tasks import task_class

    folder = find_folder(name)
    task, settings = load_settings(folder)
    if not (folder / WEIGHTS).exists():
        raise InputError(f"{folder} has no {WEIGHTS}; fetch or make it again")
    header = model_config.read_header(folder / WEIGHTS)
    try:
        # What no weights fit is not built: the meta device takes no memory.
        with torch.device("meta"), model_config.at_most(model_config.MOST_MODULES):
            state = task_class(task)(**settings).state_dict()
        model_config.compare(header, state, folder / "config.json")
        model = task_class(task)(**settings)
        model.load_state_dict(load_file(folder / WEIGHTS))
        model.origin = of_folder(folder)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}/config.json does not build a model: {error}") from error
    except SafetensorError as error:
        raise InputError(
            f"{folder / WEIGHTS} is no whole safetensors file ({error}); fetch or make it again"
        ) from error
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} are not those of its config.json: {explain(error)}") from error
    return model.eval()
