"""A model for a task: a backbone of the zoo and a head, saved as a folder and loaded from it or from the Hub."""

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
from res2net_zoo.utils.packages import require
from res2net_zoo.weights import bill_of_materials, model_config
from res2net_zoo.weights.convert import explain
from res2net_zoo.weights.downloads import save_weights
from res2net_zoo.weights.model_folder import replaced_folder, write_backbone
from res2net_zoo.weights.model_names import parse_name
from res2net_zoo.weights.pretrained import create_model
from res2net_zoo.weights.provenance import KEY, Provenance, of_folder, of_model

Figures = dict[str, float]

# Raised for an unreadable file, a damaged image, or an image too large for memory.
NO_IMAGE = (InputError, OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def reason(error: BaseException, path: Path) -> str:
    """Return why a file cannot be read, without the file's name, for a message that already names it."""
    return str(error).removeprefix(f"cannot read {path}: ") or type(error).__name__


class Annotated(Dataset, ABC):
    """Annotated images. Construction checks all annotations; images are read one by one.

    Attributes:
        classes: Name of each class.
        samples: What a sample is, in the plural, for messages.
    """

    classes: list[str]
    samples: ClassVar[str] = "images"

    def remarks(self) -> dict[str, str]:
        """Return notes on the metrics of this data for the card and the results, by a short name."""
        return {}

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def __getitem__(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        """Return an image in RGB, upright, and its annotations."""

    @abstractmethod
    def path(self, i: int) -> Path:
        """Return the path of an image."""


class Score(ABC):
    """The metrics of an evaluation, exact on any number of processes.

    Each process updates with its own images; all processes call `compute`, which returns the same metrics in each.
    """

    @abstractmethod
    def update(self, i: int, target: dict[str, Any], prediction: Any) -> None:
        """Add the prediction for image `i`."""

    @abstractmethod
    def compute(self, accelerator: Accelerator) -> Figures:
        """Return the metrics by name, as in the paper's tables."""

    def details(self) -> dict[str, Any]:
        """Return further results in addition to the metrics; call it after `compute`."""
        return {}

    def results(self) -> list[dict[str, Any]]:
        """Return the predictions of all processes in COCO's results format; call it after `compute`.

        Raises:
            InputError: COCO's results format does not cover this task.
        """
        raise InputError("COCO's results format covers detection and keypoints only")


class TaskModel(nn.Module, ABC):
    """A backbone of the zoo with a task's head.

    Args:
        model: Name of the backbone, as for `timm.create_model`.
        classes: Name of each class.
        head: One of the task's `heads`; defaults to the first.
        img_size: Image size in training and evaluation, in pixels; defaults to the task's.
        output_stride: Output stride of the backbone, for heads that support others than 32.
        mean: Mean of the image channels, from 0 to 1; defaults to the backbone's.
        std: Standard deviation of the image channels; defaults to the backbone's.
        head_kwargs: Further arguments of the network that `build` creates.
        pretrained: Whether to load the backbone's weights.

    Attributes:
        settings: All arguments above, which rebuild the model; `model` is the architecture.
        network: Backbone and head.
        origin: Provenance of the weights.
        scales: Range of the random scale factor in training; None if the task does not scale images.

    Raises:
        InputError: The head, the backbone or one of `head_kwargs` is unknown or unsupported.
    """

    task: ClassVar[str]
    hub_task: ClassVar[str]  # the Hub's name of the task
    heads: ClassVar[tuple[str, ...]]
    img_size: ClassVar[int]  # the default
    scales: tuple[float, float] | None = None
    best: ClassVar[str]  # metric that selects the best epoch; higher is better
    requires: ClassVar[tuple[str, ...]] = ()  # packages
    extra: ClassVar[str] = "tasks"  # the extra of res2net-zoo that installs them
    less_is_better: ClassVar[frozenset[str]] = frozenset()  # metrics that are errors
    threshold: ClassVar[float | None] = None  # lowest score that is drawn; None if predictions have no scores
    tolerance: ClassVar[float] = 0.05  # half of the last digit that the paper prints
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
            raise InputError(f"{self.task} does not support the head {head}; supported: {', '.join(self.heads)}")
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
                f"{model} is unsupported as the backbone of a task: its features_only model in timm lacks "
                f"{min(missing)}, so the trained weights could not be loaded into {model}"
            )
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.settings[key]).view(-1, 1, 1), persistent=False)
        if len(self.mean) != 3:
            raise InputError(f"{model} takes images of {len(self.mean)} channels; tasks need RGB")
        self._frozen_norms: list[nn.Module] = []
        try:
            self.network = self.build(features, **self.settings["head_kwargs"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            given = " ".join(f"{name}={value}" for name, value in self.settings["head_kwargs"].items())
            hint = f" with {given}; correct these" if given else ""
            # Messages of the other types come from Python itself and do not help a user.
            reason = f": {error}" if type(error) in (RuntimeError, ValueError) else ""
            message = f"{head} cannot be built on {model}{hint}{reason}"
            raise InputError(message, *["head_kwargs"] * bool(given)) from error

    @classmethod
    def check_installed(cls) -> None:
        """Check that the task's optional dependencies are installed.

        Raises:
            InputError: One is missing.
        """
        require(f"{cls.task} needs", cls.extra, *cls.requires)

    @classmethod
    @abstractmethod
    def open(cls, data: str, split: str, head: str, classes: Sequence[str] | None = None) -> Annotated:
        """Open annotated images.

        Args:
            data: Path of the data.
            split: Name of the split.
            head: Head of the model; some heads need more annotations than others.
            classes: Classes of the model, which the data must match; defaults to those of the data.

        Raises:
            InputError: The data are missing, or an annotation is invalid.
        """

    @classmethod
    def options(cls, data: Annotated, flip_pairs: Sequence[str] | None) -> dict[str, Any]:
        """Return the arguments of a model for this data in addition to its classes.

        Args:
            data: The training data.
            flip_pairs: Pairs of joints to swap in mirrored images, as ONE:OTHER, or `none` alone.

        Raises:
            InputError: The task does not use joints, or the pairs are invalid.
        """
        if flip_pairs is not None:
            raise InputError(f"pairs of joints are for keypoints, not for {cls.task}", "flip_pairs")
        return {}

    def about(self) -> dict[str, str]:
        """Return facts about the model for its card, in addition to its settings, by a short name."""
        return {}

    @abstractmethod
    def build(self, features: Any, **kwargs: Any) -> nn.Module:
        """Build the network on a backbone, a `features_only` model of timm."""

    @property
    @abstractmethod
    def features(self) -> nn.Module:
        """The backbone of the network."""

    @abstractmethod
    def transform(self, image: Image.Image, target: dict[str, Any], train: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """Convert an image and its annotations to the input of `forward`, with augmentation in training.

        Randomness comes from the global random states of torch, NumPy and Python. Loader processes call this
        method, so it must not use the model's tensors, which may be on a GPU.

        Returns:
            The image (3, H, W) from 0 to 1, and its target.
        """

    def collate(self, samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> tuple[Any, list[dict[str, Any]]]:
        """Make a batch of results of `transform`; images are not stacked, because their sizes differ in evaluation."""
        return [image for image, _ in samples], [target for _, target in samples]

    @abstractmethod
    def forward(self, images: Any, targets: list[dict[str, Any]] | None = None) -> Any:
        """Return the losses by name in training, and a prediction per image in evaluation, without targets."""

    @abstractmethod
    def score(self, data: Annotated) -> Score:
        """Return an object that computes the metrics of an evaluation on `data`."""

    @abstractmethod
    def draw(self, image: Image.Image, prediction: Any, threshold: float | None = None) -> Image.Image:
        """Return the image with a prediction drawn on it.

        Args:
            image: The image; it is not modified.
            prediction: The output of `forward` for the image.
            threshold: Lowest score that is drawn; None for the task's default.
        """

    @abstractmethod
    def to_records(self, prediction: Any, threshold: float | None = None) -> list[dict[str, Any]]:
        """Return the objects of a prediction for JSON, with pixel coordinates and boxes in COCO's format.

        Args:
            prediction: The output of `forward` for an image.
            threshold: Lowest score of an object; None for the task's default.
        """

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (..., 3, H, W) from 0 to 1, normalized for the backbone."""
        return (images - self.mean) / self.std

    def freeze(self, stages: str, batch_norm: bool) -> None:
        """Freeze the backbone's first stages.

        Args:
            stages: Number of stages, of which the stem is the first, or `all`.
            batch_norm: Whether to freeze every BatchNorm of the backbone, including its statistics.

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
                    self._frozen_norms.append(owner)

    def train(self, mode: bool = True) -> "TaskModel":
        """Set training or evaluation mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_norms:
            module.eval()
        return self

    def save(self, folder: Path, card: ModelCard) -> None:
        """Save the model as a folder, which `load` reads and which can be uploaded to the Hub.

        An existing folder is replaced atomically. Its subfolder `backbone` is a model that timm reads as
        `local-dir:FOLDER/backbone`, for example to start the training of another task.

        Args:
            folder: Path of the folder.
            card: Model card.
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
            bill_of_materials.write(new, folder.resolve().name)


def check_options(network: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check options against a network's parameters, because some networks silently ignore unknown names.

    Raises:
        InputError: A name is unknown, or the value of a numeric parameter is not a number.
    """
    known = {
        name: option for name, option in signature(network).parameters.items() if option.kind != option.VAR_KEYWORD
    }
    for name, value in options.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known options: {', '.join(known)}"
            raise InputError(f"{network.__name__} does not support the option {name}; {hint}")
        if isinstance(known[name].default, int | float) and not isinstance(value, int | float):
            example = known[name].default
            raise InputError(f"{network.__name__}'s {name} must be a number, such as {example}, not {value}")


def find_folder(name: str) -> Path:
    """Return the local folder of a task's model, downloaded if it is on the Hub.

    Args:
        name: A path, `local-dir:DIR`, or `hf-hub:ORG/NAME`.

    Raises:
        InputError: The folder is missing or cannot be downloaded.
    """
    source, identifier = parse_name(name if ":" in name else f"local-dir:{name}")
    if source == "local-dir":
        if not Path(identifier).is_dir():
            finish_replacing(Path(identifier))
        if not (Path(identifier) / "config.json").is_file():
            raise InputError(
                f"{identifier} is not a model folder: config.json is missing; training on a task writes it"
            )
        return Path(identifier)
    repository, _, revision = identifier.partition("@")
    try:
        files = ["config.json", WEIGHTS, "README.md"]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except LocalEntryNotFoundError as error:
        raise InputError(f"cannot reach the Hub, and {repository} is not in the local cache") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"cannot read {repository} from the Hub: {error}") from error


def load_settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the task of a model folder and the settings that build its model.

    Raises:
        InputError: It is not a folder of a task's model.
    """
    from res2net_zoo.tasks import TASKS

    try:
        config = model_config.read_task(folder / "config.json")
    except InputError as error:
        raise InputError(f"{folder} is not a folder of a task's model: {error}") from error
    task = config.pop("task")
    for key in ("library_name", KEY):
        config.pop(key, None)
    if task not in TASKS:
        raise InputError(f"{folder} has the unknown task {task}; known: {', '.join(TASKS)}")
    return task, config


def load(name: str) -> TaskModel:
    """Load a task's model with its weights, in evaluation mode.

    Args:
        name: A folder's path, `local-dir:DIR`, or `hf-hub:ORG/NAME`.

    Raises:
        InputError: The model is missing or damaged.
    """
    from res2net_zoo.tasks import task_class

    folder = find_folder(name)
    task, settings = load_settings(folder)
    if not (folder / WEIGHTS).exists():
        raise InputError(f"{folder} has no {WEIGHTS}; download or create it again")
    header = model_config.read_header(folder / WEIGHTS)
    try:
        # Compare shapes on the meta device first, which allocates no memory.
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
            f"{folder / WEIGHTS} is not a complete safetensors file ({error}); download or create it again"
        ) from error
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} do not match its config.json: {explain(error)}") from error
    return model.eval()
