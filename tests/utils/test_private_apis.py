"""Undocumented names of other libraries are used in one file only, and still exist and behave as expected."""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import datasets
import httpx2
import pytest
import torch
from huggingface_hub import set_client_factory
from torch import nn
from torch.autograd import forward_ad

from res2net_zoo.utils import private_apis
from tests.conftest import ROOT

FILES = [path for folder in ("res2net_zoo", "scripts", "hub") for path in sorted((ROOT / folder).rglob("*.py"))]
# `torch._assert` and `os._exit` are documented; named tuples have `_replace`; argparse's parsers list `_actions`.
ALLOWED = {"torch._assert", "os._exit", "._replace", "._actions", "._parameters"}


def private_names(path: Path) -> list[str]:
    """Return the private names of other modules and objects that a file uses."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("res2net_zoo"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{node.module}: {name}" for name in names if name.startswith("_") and not name.endswith("__")]
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                found.append(f"{owner}.{node.attr}")
    return found


def test_private_names_are_used_in_one_file_only():
    rest = [path for path in FILES if path.name != "private_apis.py"]
    names = {str(path.relative_to(ROOT)): private_names(path) for path in rest}
    others = {
        path: [name for name in found if not any(name == allowed or name.endswith(allowed) for allowed in ALLOWED)]
        for path, found in names.items()
    }
    # Instances of our own classes may access each other.
    own = {name for path in rest for name in defined(path)}
    left = {path: [name for name in found if name.rpartition(".")[2] not in own] for path, found in others.items()}
    assert not {path: found for path, found in left.items() if found}


def defined(path: Path) -> set[str]:
    """Return the private names that a file defines: functions, classes, constants and attributes of `self`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return {name for name in names if name.startswith("_")}


@pytest.mark.parametrize("api", private_apis.PRIVATE_APIS, ids=lambda api: api.name)
def test_private_names_exist(api):
    library = api.module.partition(".")[0]
    try:
        getattr(private_apis, api.name)
    except (ImportError, AttributeError) as error:
        pytest.fail(
            f"{library} {version(library)} has moved {api.module}.{api.name}, used of {api.checked_with}: {error}"
        )


def test_import_does_not_import_libraries():
    code = (
        "import sys; import res2net_zoo.utils.private_apis as p; print({'torch', 'timm', 'datasets'} & {*sys.modules})"
    )
    # Without the __init__ of the package, which registers the models.
    package = "m = types.ModuleType('res2net_zoo'); m.__path__ = ['res2net_zoo']; sys.modules['res2net_zoo'] = m"
    code = f"import sys, types; {package}; {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        private_apis.nothing  # noqa: B018


def test_timm():
    assert private_apis.feature_take_indices(4, [0, -1]) == ([0, 3], 3)
    from timm.models import _helpers, _hub

    assert _helpers._torch_load is _hub._torch_load and _hub._torch_load.__module__.startswith("res2net_zoo")


def test_transforms_and_forward_mode():
    seen = []
    torch.func.vmap(lambda x: seen.append(private_apis._are_functorch_transforms_active()) or x)(torch.ones(2))
    assert seen == [True] and not private_apis._are_functorch_transforms_active()
    assert not private_apis.is_forward_ad_active()
    with forward_ad.dual_level():
        assert private_apis.is_forward_ad_active()


@pytest.mark.parametrize("keep", [False, True])
def test_retain_graph_is_detected(keep):
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(private_apis._get_current_graph_task_keep_graph())
            return grad

    Identity.apply(torch.ones(1, requires_grad=True)).backward(retain_graph=keep)
    assert seen == [keep]


def test_hooks():
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        module = nn.ReLU()
        assert not private_apis.has_hooks(module)
        handle = getattr(module, register)(lambda *args: None)
        assert private_apis.has_hooks(module)
        handle.remove()
    assert not private_apis._has_any_global_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert private_apis._has_any_global_hook()
    handle.remove()


def test_settings_of_torch(monkeypatch):
    assert private_apis.has_bfloat16_convolutions() in (True, False)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    private_apis.fail_at_recompile_limit()
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    with private_apis.freezing():
        assert torch._inductor.config.freezing
    assert not torch._inductor.config.freezing
    assert callable(torch.cuda._sleep)


def test_torchvision():
    levels = private_apis.initLevelMapper(2, 5)([torch.tensor([[0.0, 0, 20, 20], [0, 0, 800, 800]])])
    assert levels.tolist() == [0, 3]


def test_datasets():
    rows = datasets.Dataset.from_dict({"label": [5, 6, 7]})
    some = rows.select([2, 0])
    assert private_apis.row_indices(rows) is None
    assert private_apis.row_indices(some).column(0).to_pylist() == [2, 0]
    assert private_apis.fingerprint_of(rows) != private_apis.fingerprint_of(some)
    assert private_apis.base_plus_ext("a/b.seg.png") == ("a/b", "seg.png")
    builder = private_apis.WebDataset
    assert builder.DECODERS["cls"] and builder.NUM_EXAMPLES_FOR_FEATURES_INFERENCE
    assert callable(builder._get_pipeline_from_tar) and callable(builder._generate_examples)


def test_hub_client_factory():
    before, wrapped = private_apis.hub_client_factory(), []
    try:
        set_client_factory(httpx2.Client)
        assert private_apis.hub_client_factory() is httpx2.Client
    finally:
        set_client_factory(before)
    with httpx2.Client() as client:
        private_apis.wrap_network(client, lambda network: wrapped.append(network) or network)
    assert wrapped


def test_hidden_module_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "only_for_this_test.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with private_apis.hidden("only_for_this_test"), pytest.raises(ImportError):
        import_module("only_for_this_test")
    module = import_module("only_for_this_test")
    with private_apis.hidden("only_for_this_test"):  # imported modules stay
        assert sys.modules["only_for_this_test"] is module
