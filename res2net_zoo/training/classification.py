"""The objective of classification: model, teacher, loss and evaluation."""

import argparse
import copy
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.data import resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from res2net_zoo import evaluation
from res2net_zoo.data.labels import match_classes
from res2net_zoo.data.preprocessing import Normalize
from res2net_zoo.evaluation import Counts
from res2net_zoo.kernels.training import accelerate_training
from res2net_zoo.training.augmentation import create_mixup
from res2net_zoo.training.data import TrainingData
from res2net_zoo.training.loader import batches, seed_of
from res2net_zoo.training.loop import Epoch, Objective, State
from res2net_zoo.training.loss import Criterion, balanced
from res2net_zoo.training.metrics import best_of
from res2net_zoo.training.optimization import freeze
from res2net_zoo.training.report import Report
from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.processes import all_or_none, workers_of
from res2net_zoo.weights import provenance
from res2net_zoo.weights.pretrained import create_model
from res2net_zoo.weights.provenance import Provenance


@dataclass
class Network:
    """A model and its state for training.

    Attributes:
        model: The model, on its device.
        origin: Provenance of its weights.
        frozen: Modules that stay in evaluation mode.
        average: Moving average of the weights, or None.
        teacher: Teacher for distillation, or None.
    """

    model: Any
    origin: Provenance
    frozen: list[nn.Module]
    average: ModelEmaV3 | None
    teacher: nn.Module | None


def build_network(args: argparse.Namespace, names: list[str], accelerator: Accelerator) -> Network:
    """Build the model to train, with the same weights in every process.

    Raises:
        InputError: The model or its weights are missing, or it cannot be trained with these settings.
    """
    set_seed(args.seed, deterministic=args.deterministic)
    model = all_or_none(lambda: build_model(args, names, args.pretrained))
    origin = all_or_none(lambda: origin_of(args, model))
    all_or_none(lambda: check_batch_size(model, args.batch_size))
    if args.sync_bn:
        model = synchronize_batch_norm(model, accelerator)
    frozen = freeze(model, args.freeze, args.freeze_bn)
    model = accelerate_training(model.to(accelerator.device))
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    average = None if args.ema is None else ModelEmaV3(model, args.ema, use_warmup=True)
    teacher = all_or_none(lambda: build_teacher(args, model, names, accelerator)) if args.teacher else None
    return Network(model, origin, frozen, average, teacher)


def build_model(args: argparse.Namespace, names: list[str], pretrained: bool) -> Any:
    """Build a model with a classifier for the given classes, pretrained or with random weights."""
    options: dict[str, Any] = {"drop_path_rate": args.drop_path} if args.drop_path else {}
    if args.drop:
        options["drop_rate"] = args.drop
    model: Any = create_model(args.model, pretrained, num_classes=len(names), **options)
    if args.img_size:
        model.pretrained_cfg["input_size"] = (model.pretrained_cfg["input_size"][0], args.img_size, args.img_size)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def check_batch_size(model: nn.Module, batch_size: int) -> None:
    """Check that a model can be trained with a batch size, by running it on the meta device.

    Args:
        model: The model; its config defines the image size.
        batch_size: Images per batch.

    Raises:
        InputError: The model fails with this batch size.
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


def origin_of(args: argparse.Namespace, model: Any) -> Provenance:
    """Return the provenance of the trained weights."""
    before = provenance.of_model(args.model, model.pretrained_cfg, args.pretrained)
    after = before.after_training(
        provenance.shown(args.model) if args.pretrained else None,
        args.license,
        provenance.shown(args.teacher) if args.teacher else None,
    )
    provenance.warn_of_other_license(before, after)
    return after


def synchronize_batch_norm(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Make BatchNorm compute its statistics over all processes."""
    if accelerator.num_processes == 1:
        return model
    if accelerator.device.type == "cpu":
        raise InputError("torch synchronizes BatchNorm on GPUs only; disable it on CPUs", "sync_bn")
    return convert_sync_batchnorm(model)


def build_teacher(args: argparse.Namespace, model: Any, names: list[str], accelerator: Accelerator) -> nn.Module:
    """Build the teacher for distillation.

    Raises:
        InputError: Its classes or input channels differ from those of the model.
    """
    teacher: Any = create_model(args.teacher)
    labels = teacher.pretrained_cfg.get("label_names")
    same = teacher.num_classes == len(names) and not (labels and set(labels) != set(names))
    order = match_classes(names, len(names), labels).of_label if same else None
    if not same or order not in (None, list(range(len(names)))):
        raise InputError(
            f"the teacher {args.teacher} has {teacher.num_classes} classes, not these {len(names)} in this "
            "order; train it on them first",
            "teacher",
        )
    if teacher.pretrained_cfg["input_size"][0] != model.pretrained_cfg["input_size"][0]:
        raise InputError(
            f"the teacher {args.teacher} and {args.model} have different numbers of input channels", "teacher"
        )
    teacher = teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def build_task(
    args: argparse.Namespace, network: Network, wrapped: nn.Module, counts: list[int] | None, device: torch.device
) -> nn.Module:
    """Return timm's task, which computes the loss: of classification, or of distillation if there is a teacher.

    Args:
        args: The settings.
        network: The model.
        wrapped: The model as Accelerate prepared it.
        counts: Training images of each class, or None if unknown.
        device: The device.
    """
    weights = balanced(counts) if args.balance == "loss" and counts else None
    criterion = Criterion(args.loss, args.smoothing, weights, args.bce_threshold)
    if network.teacher is None:
        return ClassificationTask(wrapped, criterion, device=device, verbose=False).to(device)
    task: Any = LogitDistillationTask(
        network.model,
        network.teacher,
        criterion,
        task_loss_weight=args.task_weight,
        temperature=args.temperature,
        device=device,
        verbose=False,
    )
    task.trainable_module = wrapped
    return task.to(device)


class Classification(Objective):
    """Training of a classifier.

    Args:
        args: The settings.
        data: The training and evaluation images.
        network: The model.
        state: The state of training.
        loader: Training batches, from `training_loader`.
        plan: Settings that must not change when the run is resumed.
        left_out: Indices of training images skipped from the start.
        report: Writes the model folder.
        accelerator: The processes.

    Attributes:
        unreadable: Training images that could not be decoded during training, by index, or in a stream by position.
    """

    figure = "top-1"

    def __init__(
        self,
        args: argparse.Namespace,
        data: TrainingData,
        network: Network,
        state: State,
        loader: DataLoader,
        plan: dict[str, Any],
        left_out: list[int],
        report: Report,
        accelerator: Accelerator,
    ) -> None:
        self.args, self.data, self.network, self.state, self.loader = args, data, network, state, loader
        self.plan, self.left_out, self.report, self.accelerator = plan, left_out, report, accelerator
        self.unreadable: set[Any] = set(data.unreadable)
        self.task = build_task(args, network, state.wrapped, data.counts, accelerator.device)
        self.normalize = Normalize(network.model).to(accelerator.device)
        self.mixup = create_mixup(args.mixup, args.cutmix, args.mixup_prob, args.smoothing, len(data.names))

    def train_mode(self) -> None:
        """Put the model in training mode, except for its frozen layers."""
        self.task.train()
        for module in self.network.frozen:
            module.eval()

    def batches(self, epoch: int, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (N, C, H, W) and classes (N,); record images that cannot be decoded."""
        return batches(self.loader, epoch, first, self.args.skip_corrupt, self.unreadable)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor], step: int, part: int) -> torch.Tensor:
        """Return the loss of images (N, C, H, W), in uint8 or normalized, and classes (N,)."""
        images, targets = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch)
        images = self.normalize(images)
        set_seed(seed_of(self.args.seed, 3, step, part, self.accelerator.process_index))
        if self.mixup is not None and len(images) % 2 == 0:  # one may have been skipped
            images, targets = self.mixup(images, targets)
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.task(images, targets)["loss"]

    def checkpoint(self) -> dict[str, Any]:
        """Return the plan, and the images skipped in any process."""
        # In a stream, positions differ between epochs.
        unreadable = [] if self.args.streaming else sorted(set(gather_object(list(self.unreadable))))
        return {"plan": self.plan, "left_out": self.left_out, "unreadable": unreadable}

    def evaluate(self, epoch: Epoch) -> dict[str, Any]:
        """Evaluate the model and its moving average."""
        self.count_unreadable()
        row: dict[str, Any] = {
            "epoch": epoch.number,
            "step": epoch.step,
            "lr": epoch.lr,
            "train_loss": round(epoch.loss, 5),
        }
        average = self.network.average
        models = {"": self.network.model} if average is None else {"": self.network.model, "ema_": average.module}
        for kind, model in models.items():
            counts = self.measure(model)
            checked = self.args.check and not self.args.streaming  # the check has warned already
            if counts.corrupt and epoch.number == 1 and not (kind or checked):
                split = self.data.valid.split
                warn(f"{len(counts.corrupt)} images of {split} cannot be decoded and are skipped")
            row |= {f"{kind}top1": counts.percent(counts.top1), f"{kind}top5": counts.percent(counts.top5)}
            self.report.samples = counts.samples
        speed = epoch.images_per_second
        row["images_per_second"] = None if speed is None else round(speed, 1)
        row["peak_memory_mb"] = round(peak_memory(self.accelerator) / 2**20)
        return row

    def count_unreadable(self) -> None:
        """Combine the training images that any process could not decode; warn about new ones."""
        self.unreadable |= set(gather_object(list(self.unreadable)))
        if len(self.unreadable) > len(self.data.unreadable):
            split = self.data.train.split
            warn(f"{len(self.unreadable)} images of {split} cannot be decoded and are skipped")
        if self.args.streaming:
            self.unreadable.clear()  # positions differ between epochs
        self.data.unreadable = sorted(self.unreadable)

    def measure(self, model: nn.Module, **options: Any) -> Counts:
        """Evaluate a model; `options` are further arguments of `evaluate`."""
        names, valid = self.data.names, self.data.valid
        return evaluation.evaluate(
            model,
            valid,
            match_classes(valid.class_names or names, len(names), names),
            self.accelerator,
            batch_size=self.args.batch_size,
            workers=workers_of(self.args.workers, self.accelerator.device),
            skip_corrupt=self.args.skip_corrupt,
            **options,
        )

    def best_epoch(self) -> int:
        """Return the number of the epoch with the best top-1; the latest on ties."""
        return best_of(self.report.metrics)[1]

    def describe(self, row: Mapping[str, Any]) -> str:
        """Return the loss and the accuracies of an epoch as text."""
        figures = [f"{key.replace('_', ' ').replace('top', 'top-')} {row[key]:.3f}" for key in row if "top" in key]
        return f"loss {row['train_loss']:.4f}, {', '.join(figures)}"

    def write(self) -> None:
        """Write the metrics, and the models that are the best so far."""
        average = self.network.average
        self.report.epoch(self.network.model, None if average is None else average.module)


def peak_memory(accelerator: Accelerator) -> int:
    """Return the peak memory of this process on its device, in bytes."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
