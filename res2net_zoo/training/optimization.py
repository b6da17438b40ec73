"""What training loops need beside timm's and Accelerate's: frozen stages, weighted classes, learning rates."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.loss import BinaryCrossEntropy
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import transforms

from res2net_zoo.data.images import Samples
from res2net_zoo.data.labels import match_classes
from res2net_zoo.utils.command_line import did_you_mean
from res2net_zoo.utils.errors import InputError

# What timm.scheduler.create_scheduler_v2 documents; timm has no list of them.
SCHEDULES = ("cosine", "step", "multistep", "poly", "tanh", "constant", "wsd", "rsqrt", "plateau", "none")


def freeze(model: Any, stages: str, batch_norm: bool = False) -> list[nn.Module]:
    """Freeze the first stages of a model: their parameters, and their BatchNorm statistics.

    Args:
        model: A model of timm's interface.
        stages: How many, the stem being the first; `all` leaves the classifier only.
        batch_norm: Whether the statistics of every BatchNorm stay what they are.

    Returns:
        The modules that must stay in evaluation mode while the others train.

    Raises:
        InputError: The model has fewer stages.
    """
    groups = group_parameters(model, model.group_matcher(coarse=True))
    last = max(groups)  # the classifier
    number = last if stages == "all" else int(stages)
    if number > last:
        raise InputError(f"--freeze {stages}: this model has {last} stages with its stem; `all` freezes them")
    frozen = {name for group in range(number) for name in groups[group]}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and (batch_norm or (module.weight is not None and not module.weight.requires_grad))
    ]


def scaled_lr(lr: float, opt: str, batch: int, base: int | None) -> float:
    """Scale a learning rate from the batch size that it was chosen for to another.

    Args:
        lr: Learning rate for batches of `base` images.
        opt: timm's name of the optimizer. Adaptive ones scale with the root of the batch size, the
            others linearly (Goyal et al., 2017, arXiv 1706.02677), as in timm's train.py.
        batch: Images an optimizer step, over all processes.
        base: Images an optimizer step that `lr` was chosen for; None if for `batch`.

    Returns:
        The learning rate.
    """
    if base is None:
        return lr
    adaptive = any(word in opt.lower() for word in ("ada", "lamb"))
    return lr * (batch / base) ** (0.5 if adaptive else 1)


@dataclass
class Optimization:
    """Optimizer and learning rate of a training.

    Attributes:
        epochs: Length of the schedule.
        opt: timm's name of the optimizer.
        lr: Highest learning rate.
        momentum: Momentum.
        weight_decay: Weight decay.
        sched: timm's name of the schedule.
        warmup_epochs: Epochs in which the learning rate grows, or a part of one; a quarter of `epochs` at
            most, as a recipe's may be longer than a short training.
        min_lr: Learning rate at the end.
        decay_epochs: Epochs between two steps of the schedule `step`.
        decay_milestones: Epochs after which the schedule `multistep` has one.
        decay_rate: Factor of a step; the power of the schedule `poly`.
        decay_all: Whether biases and BatchNorm have weight decay as well.
        layer_decay: Factor of the learning rate from each layer to the one before.
    """

    epochs: int
    opt: str = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    sched: str = "cosine"
    warmup_epochs: float = 0
    min_lr: float = 0
    decay_epochs: float | None = None
    decay_milestones: list[int] = field(default_factory=lambda: [90, 180, 270])
    decay_rate: float = 0.1
    decay_all: bool = False
    layer_decay: float | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Optimization":
        """Take those of a program's settings that are of these names."""
        return cls(**{one.name: settings[one.name] for one in fields(cls) if one.name in settings})

    def __post_init__(self) -> None:
        """Check the names, which timm does long after the data is read.

        Raises:
            InputError: timm has no such optimizer or schedule.
        """
        name = self.opt.lower()
        if name.removeprefix("lookahead_").rpartition("_")[2] not in (optimizers := list(map(str, list_optimizers()))):
            hint = did_you_mean(name, optimizers, "timm.optim.list_optimizers() lists them")
            raise InputError(f"timm makes no optimizer {self.opt}; {hint}")
        if self.sched not in SCHEDULES:
            hint = did_you_mean(self.sched, SCHEDULES, f"there are {', '.join(SCHEDULES)}")
            raise InputError(f"timm makes no schedule {self.sched}; {hint}")

    def create(self, model: nn.Module, steps: int) -> tuple[Any, Any]:
        """Make optimizer and schedule.

        Args:
            model: What is trained of it requires gradients.
            steps: Of an epoch.

        Returns:
            The optimizer; timm's scheduler, of which `step_update` takes the number of steps that were done,
            or None for the schedule `none`.

        Raises:
            InputError: timm has no such optimizer or schedule.
        """
        warmup: Any = min(self.warmup_epochs, self.epochs / 4)  # timm's annotation says int
        try:
            optimizer = create_optimizer_v2(
                model,
                self.opt,
                lr=self.lr,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                filter_bias_and_bn=not self.decay_all,
                layer_decay=self.layer_decay,
            )
            scheduler, _ = create_scheduler_v2(
                optimizer,
                self.sched,
                num_epochs=self.epochs,
                warmup_epochs=warmup,
                warmup_lr=min(1e-5, self.lr),
                min_lr=self.min_lr,
                decay_epochs=self.decay_epochs,
                decay_milestones=self.decay_milestones,
                decay_rate=self.decay_rate,
                step_on_epochs=False,
                updates_per_epoch=steps,
            )
        except (AssertionError, ValueError, RuntimeError) as error:
            raise InputError(f"timm makes no optimizer {self.opt} with schedule {self.sched}: {error}") from error
        return optimizer, scheduler


def highest_rate(optimizer: Any) -> float:
    """Return the learning rate, of the last layers where each has its own."""
    return max(group["lr"] for group in optimizer.param_groups)


class Criterion(nn.Module):
    """Cross entropy, or binary cross entropy of each class, of class numbers or of mixed targets.

    The mean is over images, also with class weights, so that the mean over processes is the mean
    over all their images.

    Args:
        loss: `ce` or `bce` (as in Wightman et al., 2021, arXiv 2110.00476).
        smoothing: Label smoothing, of class numbers; mixed targets have theirs.
        weights: Weight of each class, for `ce`; their mean over the images should be 1.
        threshold: Share of a mixed target above which a class is fully there, for `bce`.
    """

    weights: torch.Tensor | None

    def __init__(
        self, loss: str, smoothing: float, weights: torch.Tensor | None = None, threshold: float | None = None
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.binary = BinaryCrossEntropy(smoothing, target_threshold=threshold) if loss == "bce" else None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (N, classes) against classes (N,) or their shares (N, classes)."""
        logits = logits.float()
        if self.binary is not None:
            return self.binary(logits, target)
        smoothing = 0.0 if target.is_floating_point() else self.smoothing
        if self.weights is not None and not target.is_floating_point():
            # Torch divides by the sum of the batch's weights for class numbers, by N for shares.
            target = nn.functional.one_hot(target, logits.shape[1]).to(logits.dtype)
        return nn.functional.cross_entropy(logits, target, weight=self.weights, label_smoothing=smoothing)


def balanced(counts: Sequence[int]) -> torch.Tensor:
    """Return a weight for each class by which all classes count the same, 1 on the mean over images."""
    numbers = torch.tensor(counts, dtype=torch.float32)
    return numbers.sum() / (len(numbers) * numbers)


def training_samples(
    model: Any,
    names: Sequence[str],
    augmentation: dict[str, Any],
    crop_padding: int,
    read: Callable[[dict[str, Any]], bytes],
) -> Samples:
    """Make what turns rows into training samples.

    Args:
        model: The model; its config gives size and interpolation.
        names: The classes.
        augmentation: As for timm's `create_transform`.
        crop_padding: Pixels to pad by before a random crop, in place of a random resized crop; 0 for
            that one. As CIFAR images are trained on (He et al., 2016, sec. 4.2).
        read: From an image of a row to its content: `Source.read`.

    Returns:
        It; images come as bytes, or normalized where random erasing needs them to be.

    Raises:
        InputError: timm knows no such augmentation.
    """
    config = resolve_model_data_config(model)
    try:
        transform = create_transform(
            **config, **augmentation, is_training=True, normalize=augmentation.get("re_prob", 0) > 0
        )
    except (AssertionError, KeyError, ValueError) as error:
        policy = augmentation.get("auto_augment")
        what = f"--auto-augment {policy}: not a policy of timm's, such as rand-m9-mstd0.5, augmix-m3, original or 3a"
        raise InputError(what if policy else f"timm cannot make this augmentation: {error}") from error
    if crop_padding:
        size = config["input_size"][1:]
        transform.transforms[0:1] = [transforms.Resize(size), transforms.RandomCrop(size, padding=crop_padding)]
    classes = match_classes(names, len(names), names)
    return Samples(transform, "L" if config["input_size"][0] == 1 else "RGB", classes.targets, read)


class Normalize(nn.Module):
    """Turns bytes (N, C, H, W) into what a model takes, on its device; leaves what is normalized already."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = resolve_model_data_config(model)
        for key in ("mean", "std"):
            self.register_buffer(key, 255 * torch.tensor(config[key]).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, C, H, W), normalized."""
        return images.float().sub_(self.mean).div_(self.std) if images.dtype == torch.uint8 else images


def create_mixup(mixup: float, cutmix: float, probability: float, smoothing: float, num_classes: int) -> Mixup | None:
    """Return timm's mixup and CutMix of these alphas, None where both are 0."""
    if not mixup and not cutmix:
        return None
    return Mixup(mixup, cutmix, prob=probability, label_smoothing=smoothing, num_classes=num_classes)


def try_out(model: nn.Module, batch_size: int) -> None:
    """Run a copy of a model on a batch without data, to find out before training whether it takes one.

    Args:
        model: The model; its config gives the images' size.
        batch_size: Images a batch.

    Raises:
        InputError: It does not.
    """
    size = resolve_model_data_config(model)["input_size"]
    try:
        with torch.no_grad():
            copy.deepcopy(model).to("meta").train()(torch.empty(batch_size, *size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        shape = " x ".join(map(str, size))
        raise InputError(
            f"this model cannot be trained with batches of {batch_size} images of {shape}: {error}"
        ) from error
