"""Cost and receptive field of a model: parameters, multiply-accumulates, receptive field."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import SEModule
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode


def count(build: Callable[[], nn.Module], input_size: tuple[int, int, int], training: bool = False) -> tuple[int, int]:
    """Count parameters and multiply-accumulates on the meta device, without allocating or computing anything.

    Args:
        build: Creates the model.
        input_size: Channels, height and width of the image.
        training: Whether to include the computation of gradients.

    Returns:
        The number of parameters, and of multiply-accumulates per image in convolutions and matrix products.
    """
    counter = FlopCounterMode(display=False)
    images = 2 if training else 1  # BatchNorm can need more than one value per channel
    with torch.device("meta"), torch.set_grad_enabled(training):
        model = build().train(training)
        with counter:
            logits = model(torch.empty(images, *input_size))
            if training:
                logits.sum().backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2 // images


@dataclass(frozen=True)
class Field:
    """The receptive field of unit i of a feature map: the pixels i * stride + low to i * stride + high."""

    stride: int = 1
    low: int = 0
    high: int = 0

    def through(self, kernel_size: int, stride: int, padding: int, dilation: int) -> "Field":
        """Return the field after a sliding window."""
        low = self.low - padding * self.stride
        return Field(self.stride * stride, low, self.high + ((kernel_size - 1) * dilation - padding) * self.stride)


def _only(value: Any) -> int:
    """Return the common value of a setting for height and width."""
    values = set(value) if isinstance(value, tuple) else {value}
    if len(values) > 1:
        raise ValueError(f"the receptive field supports square windows only, not {value}")
    return values.pop()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A gate scales features by the mean of the whole map, which does not count as receptive field.
        return isinstance(m, SEModule) or super().is_leaf_module(m, module_qualified_name)


class _FieldInterpreter(fx.Interpreter):
    """Runs a traced model on receptive fields instead of tensors."""

    POINTWISE = (nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.Dropout, SEModule)
    # The field of a sum or a concatenation is the union of its parts' fields. A part may have a smaller field, but the
    # result is the largest one.
    UNIONS = (operator.add, operator.iadd, operator.getitem, torch.cat)
    # Computations on a map's size do not affect the field.
    SIZES = (getattr, operator.mod, operator.eq, torch._assert)

    def call_module(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        (field,) = args
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            settings = (module.kernel_size, module.stride, module.padding, getattr(module, "dilation", 1))
            return field.through(*map(_only, settings))
        if not isinstance(module, self.POINTWISE):
            raise ValueError(f"the receptive field of {type(module).__name__} is unsupported")
        return field

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target in self.SIZES or args[0] is None:
            return None
        if target is torch.chunk:
            return args[0]
        if target not in self.UNIONS:
            raise ValueError(f"the receptive field of {getattr(target, '__name__', target)} is unsupported")
        fields = [field for arg in args for field in (arg if isinstance(arg, (tuple, list)) else [arg])]
        fields = [field for field in fields if isinstance(field, Field)]
        (stride,) = {field.stride for field in fields}
        return Field(stride, min(field.low for field in fields), max(field.high for field in fields))


class _ForwardFeatures(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(x)


def receptive_field(model: nn.Module) -> int:
    """Return the theoretical receptive field of one unit of a model's last features.

    Args:
        model: A timm model of convolutions, poolings, sums and concatenations.

    Returns:
        Its height and width in pixels, including pixels outside the image. The global context of gates
        (squeeze-and-excitation) is not counted.

    Raises:
        ValueError: The model contains another operation, such as resizing a map.
    """
    root = _ForwardFeatures(model)
    graph = fx.GraphModule(root, _Tracer().trace(root))
    interpreter = _FieldInterpreter(graph)
    interpreter.extra_traceback = False  # keeps the graph's traceback out of the message
    field = interpreter.run(Field())
    return field.high - field.low + 1
