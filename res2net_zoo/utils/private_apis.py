"""All uses of undocumented names of other libraries.

`tests/utils/test_private_apis.py` fails if a name has moved or changed its behaviour. Libraries are imported on first
use: `from res2net_zoo.utils.private_apis import NAME` imports what NAME needs.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import datasets
    import httpx2
    from torch import nn


class PrivateApi(NamedTuple):
    """A name that a library may move without notice.

    Attributes:
        module: The library's module.
        name: Its name there.
        checked_with: The version of the library that was tested.
        reason: Why no documented name is sufficient.
    """

    module: str
    name: str
    checked_with: str
    reason: str


TIMM, TORCH, TORCHVISION, DATASETS = "timm 1.0.31", "torch 2.14.1", "torchvision 0.29.1", "datasets 5.2.0"
PRIVATE_APIS = [
    PrivateApi(
        "timm.models._features",
        "feature_take_indices",
        TIMM,
        "resolves `indices` of `forward_intermediates` as every timm model does; timm.models does not export it",
    ),
    PrivateApi(
        "timm.models._hub",
        "save_config_for_hf",
        TIMM,
        "writes config.json alone; the exported `save_for_hf` writes the weights as well, without metadata",
    ),
    PrivateApi(
        "timm.models._hub",
        "load_model_config_from_path",
        TIMM,
        "reads config.json of a `local-dir:`; the exported `load_model_config_from_hf` reads only from the Hub",
    ),
    PrivateApi(
        "timm.models._input",
        "update_model_args",
        TIMM,
        "records the arguments that rebuild a model from its config.json; only `create_model` records them otherwise",
    ),
    PrivateApi(
        "torch._C",
        "_are_functorch_transforms_active",
        TORCH,
        "custom kernels must not run under `torch.func` transforms; `torch.func` has no query",
    ),
    PrivateApi(
        "torch._C._autograd",
        "_get_current_graph_task_keep_graph",
        TORCH,
        "whether `backward` was called with `retain_graph`; a custom Function is not passed it",
    ),
    PrivateApi(
        "torch.nn.modules.module",
        "_has_any_global_hook",
        TORCH,
        "fused modules would skip global hooks; torch has only functions that register them",
    ),
    PrivateApi(
        "torchvision.ops.poolers",
        "initLevelMapper",
        TORCHVISION,
        "`MultiScaleRoIAlign` infers its levels from the first image, wrongly for small images",
    ),
    PrivateApi(
        "datasets.packaged_modules.webdataset.webdataset",
        "WebDataset",
        DATASETS,
        "a subclass reads images of all formats as one column; `load_dataset` accepts no builder class",
    ),
    PrivateApi(
        "datasets.packaged_modules.webdataset.webdataset",
        "base_plus_ext",
        DATASETS,
        "splits the names of tar members as that builder does",
    ),
]
_BY_NAME = {api.name: api for api in PRIVATE_APIS}


def __getattr__(name: str) -> Any:
    if name not in _BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_BY_NAME[name].module), name)


def wrap_timm_torch_load(wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wrap `_torch_load`, the function by which timm reads all weight files except safetensors.

    timm has no hook to check a pickle before it is loaded. Checked with timm 1.0.31, two of whose modules import the
    function by its name.
    """
    from timm.models import _helpers, _hub

    _helpers._torch_load = _hub._torch_load = wrapper(_helpers._torch_load)


def is_forward_ad_active() -> bool:
    """Return whether forward-mode differentiation is active, which `torch.autograd.forward_ad` does not report.

    Checked with torch 2.15: the level is -1 outside of `dual_level`.
    """
    from torch.autograd import forward_ad

    return forward_ad._current_level >= 0


def has_hooks(module: "nn.Module") -> bool:
    """Return whether hooks are attached to a module; torch has only methods that attach them.

    Checked with torch 2.15.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_bfloat16_convolutions() -> bool:
    """Return whether oneDNN supports bfloat16 on this CPU; `torch.backends.mkldnn` reports only if it is built in.

    Checked with torch 2.15.
    """
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fail_at_recompile_limit() -> None:
    """Make `torch.compile` raise an error at its recompile limit instead of running uncompiled code.

    `torch.compiler` has no such setting: `fullgraph=True` also refuses graph breaks. Checked with torch 2.15.
    """
    import torch

    torch._dynamo.config.fail_on_recompile_limit_hit = True


def freezing() -> contextlib.AbstractContextManager:
    """Return a context in which `torch.compile` makes constants of the weights of models that it traces for inference.

    As an option of `torch.compile` it has no effect, because the tracer reads only the global setting. Checked with
    torch 2.11 and 2.14.
    """
    import torch

    return torch._inductor.config.patch(freezing=True)


def occupy_gpu(cycles: int) -> None:
    """Keep the current stream of a GPU busy, so that kernels that are launched meanwhile start one after another.

    Checked with torch 2.11 on an H200; PyTorch's own tests use the name.
    """
    import torch

    torch.cuda._sleep(cycles)


def row_indices(rows: "datasets.Dataset") -> Any:
    """Return the row indices that a dataset selects, as a table with one column, or None for all rows.

    Without them, columns of a selection are read in Python, in seconds per million rows. Checked with datasets 5.2.
    """
    return rows._indices


def fingerprint_of(rows: "datasets.Dataset") -> str:
    """Return the hash by which `datasets` caches a dataset.

    Checked with datasets 5.2.
    """
    return rows._fingerprint


def hub_client_factory() -> Callable[[], "httpx2.Client"]:
    """Return the current factory of huggingface_hub's client; only the setter, `set_client_factory`, is public.

    Checked with huggingface_hub 2.4.
    """
    from huggingface_hub.utils import _http

    return _http._GLOBAL_CLIENT_FACTORY


def wrap_network(client: "httpx2.Client", wrapper: Callable[[Any], Any]) -> None:
    """Wrap the network backends of a client's transports.

    Transports and their backends can be passed to constructors, but not read from a client that another factory has
    created. Checked with httpx2 and httpcore2 as huggingface_hub 2.4 requires them.
    """
    import httpcore2

    for transport in [client._transport, *client._mounts.values()]:
        pool: Any = getattr(transport, "_pool", None)
        if isinstance(getattr(pool, "_network_backend", None), httpcore2.NetworkBackend):
            pool._network_backend = wrapper(pool._network_backend)


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Make the import of a module fail inside the context, unless it is already imported.

    OpenVINO sends usage data on import through `openvino_telemetry` if that is installed; the only way to opt out is a
    file in the user's home. Checked with OpenVINO 2026.4.
    """
    is_new = module not in sys.modules
    if is_new:
        sys.modules[module] = None  # type: ignore[assignment]  # makes Python raise ImportError
    try:
        yield
    finally:
        if is_new:
            del sys.modules[module]
