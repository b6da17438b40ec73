"""Frozen stages, and timm's optimizers and learning-rate schedules."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from res2net_zoo.utils.command_line import did_you_mean
from res2net_zoo.utils.errors import InputError

# timm's own are subclasses of these.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# As documented for timm.scheduler.create_scheduler_v2; timm does not export a list.
SCHEDULES = ("cosine", "step", "multistep", "poly", "tanh", "constant", "wsd", "rsqrt", "plateau", "none")


def freeze(model: Any, stages: str, batch_norm: bool = False) -> list[nn.Module]:
    """Freeze the first stages of a model: their parameters, and their BatchNorm statistics.

    Args:
        model: A model with timm's interface.
        stages: Number of stages to freeze, including the stem; `all` for all but the classifier.
        batch_norm: Whether to freeze the statistics of every BatchNorm.

    Returns:
        The modules that must remain in evaluation mode during training.

    Raises:
        InputError: The model has fewer stages.
    """
    groups = group_parameters(model, model.group_matcher(coarse=True))
    last = max(groups)  # the classifier
    number = last if stages == "all" else int(stages)
    if number > last:
        raise InputError(
            f"cannot freeze {stages} stages: this model has {last} with its stem; `all` freezes them", "freeze"
        )
    frozen = {name for group in range(number) for name in groups[group]}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return [
        module
        for module in model.modules()
        if isinstance(module, BATCH_NORMS)
        and (batch_norm or (module.weight is not None and not module.weight.requires_grad))
    ]


def scaled_lr(lr: float, opt: str, batch: int, base: int | None) -> float:
    """Scale a learning rate to the actual batch size.

    Args:
        lr: Learning rate for batches of `base` images.
        opt: timm's name of the optimizer. Learning rates of adaptive optimizers scale with the square root of the
            batch size, those of others linearly (Goyal et al., 2017, arXiv 1706.02677), as in timm's train.py.
        batch: Images per optimizer step, over all processes.
        base: Images per optimizer step for which `lr` is given; None if this is `batch`.

    Returns:
        The scaled learning rate.
    """
    if base is None:
        return lr
    adaptive = any(word in opt.lower() for word in ("ada", "lamb"))
    return lr * (batch / base) ** (0.5 if adaptive else 1)


@dataclass
class Optimization:
    """Optimizer and learning-rate schedule.

    Attributes:
        epochs: Length of the schedule.
        opt: timm's name of the optimizer.
        lr: Maximum learning rate.
        momentum: Momentum.
        weight_decay: Weight decay.
        sched: timm's name of the schedule.
        warmup_epochs: Epochs of linear warmup, or a fraction; at most a quarter of `epochs`, because the warmup of a
            recipe may be longer than a short run.
        min_lr: Learning rate at the end.
        decay_epochs: Epochs between steps of the schedule `step`.
        decay_milestones: Epochs at which the schedule `multistep` decays.
        decay_rate: Decay factor of a step; power of the schedule `poly`.
        decay_all: Whether to apply weight decay to biases and BatchNorm as well.
        layer_decay: Layer-wise decay factor of the learning rate, from the last layer to the first.
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
        """Create an instance from the settings of a program."""
        return cls(**{one.name: settings[one.name] for one in fields(cls) if one.name in settings})

    def __post_init__(self) -> None:
        """Check the names before the data is read; timm checks them later.

        Raises:
            InputError: timm has no such optimizer or schedule.
        """
        name = self.opt.lower()
        if name.removeprefix("lookahead_").rpartition("_")[2] not in (optimizers := list(map(str, list_optimizers()))):
            hint = did_you_mean(name, optimizers, "timm.optim.list_optimizers() lists them")
            raise InputError(f"timm has no optimizer {self.opt}; {hint}")
        if self.sched not in SCHEDULES:
            hint = did_you_mean(self.sched, SCHEDULES, f"choose from {', '.join(SCHEDULES)}")
            raise InputError(f"timm has no schedule {self.sched}; {hint}")

    def create(self, model: nn.Module, steps: int) -> tuple[Any, Any]:
        """Return optimizer and schedule.

        Args:
            model: The model; frozen parameters do not require gradients.
            steps: Optimizer steps per epoch.

        Returns:
            The optimizer, and timm's scheduler, whose `step_update` takes the number of completed steps; None for the
            schedule `none`.

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
            raise InputError(f"timm cannot create optimizer {self.opt} with schedule {self.sched}: {error}") from error
        return optimizer, scheduler


def highest_rate(optimizer: Any) -> float:
    """Return the highest learning rate of all layers."""
    return max(group["lr"] for group in optimizer.param_groups)
