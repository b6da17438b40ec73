"""Checks of a model folder's config, which apply to loading, verify, publish and predict."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights import model_config
from res2net_zoo.weights.pretrained import create_model
from res2net_zoo.weights.published import published_accuracies
from tests.conftest import SHIPPED_MODEL, input_error

pytestmark = pytest.mark.first_case


@pytest.fixture
def folder(tmp_path) -> Path:
    """The shipped model without its fingerprint and bill of materials, which would detect changes."""
    copy = Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "m"))
    (copy / "fingerprint.json").unlink()
    (copy / "bom.cdx.json").unlink()
    return copy


def change(folder: Path, change: dict[str, Any]) -> None:
    """Change a config; `cfg` are changes of its pretrained_cfg, `args` of its model_args."""
    content = json.loads((folder / "config.json").read_text())
    content["pretrained_cfg"] |= change.pop("cfg", {})
    content["model_args"] |= change.pop("args", {})
    (folder / "config.json").write_text(json.dumps(content | change))


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"mean {value}": {"cfg": {"mean": value}}
        for value in ("x", [0.5], 0.5, [], [float("nan")] * 3, [True] * 3, ["0.5"] * 3, [1e300] * 3, {"a": 1})
    },
    **{f"std {value}": {"cfg": {"std": value}} for value in ([0, 0, 0], [-1] * 3, [1e-300] * 3, [1] * 4, "abc", 1)},
    **{
        f"input_size {value}": {"cfg": {"input_size": value}}
        for value in ([3, -1, 5], [3, 0, 0], [3, 64], "3,64,64", [3, 64.0, 64.0], [3, 10**6, 10**6], 64, [3, True, 64])
    },
    **{
        f"crop_pct {value}": {"cfg": {"crop_pct": value}}
        for value in (-0.5, 1e-4, 100, float("nan"), float("inf"), "0.9", True, [0.9])
    },
    "crop_pct 0": {"cfg": {"crop_pct": 0}},
    "crop_mode": {"cfg": {"crop_mode": "evil"}},
    **{f"interpolation {value}": {"cfg": {"interpolation": value}} for value in ("evil", 3, ["bicubic"])},
    "pool_size": {"cfg": {"pool_size": [0, "x"]}},
    "test_input_size": {"cfg": {"test_input_size": [3, -1, 5]}},
    "unknown key": {"cfg": {"evil": 1}},
    **{f"{key} given": {"cfg": {key: "/etc/passwd"}} for key in ("file", "state_dict", "hf_hub_filename")},
    "state_dict": {"cfg": {"state_dict": {"fc.weight": [1]}}},
    "custom_load": {"cfg": {"custom_load": "hf"}},
    "control characters": {"cfg": {"tag": "\x1b[2Jin1k"}},
    "another architecture within": {"cfg": {"architecture": "resnet18"}},
    "classifier": {"cfg": {"classifier": "conv1.0"}},
    "first_conv": {"cfg": {"first_conv": "nothing"}},
    "pretrained_cfg": {"pretrained_cfg": [1]},
    "model_args": {"model_args": [1]},
    **{f"num_classes {value}": {"num_classes": value} for value in (-1, 10.0, "10", True, 10**40)},
    "a million classes": {"num_classes": 10**6, "label_names": [], "args": {"num_classes": 10**6}},
    "a thousand classes": {"num_classes": 1000, "label_names": [], "args": {"num_classes": 1000}},
    "label_names": {"label_names": {"0": "a"}},
    **{f"architecture {value}": {"architecture": value} for value in (None, 5, ["res2net_tiny"], "res2net_tinny", "")},
    "an architecture of 4 GiB": {"architecture": "eva_giant_patch14_224"},
    "pretrained_strict": {"args": {"pretrained_strict": False}},
    "features_only": {"args": {"features_only": True}},
    "checkpoint_path": {"args": {"checkpoint_path": "/etc/passwd"}},
    "unknown argument": {"args": {"evil": 1}},
    "a million layers": {"args": {"layers": [10**6] * 4}},
    "many layers": {"args": {"layers": [60_000] * 4}},
    "a window of timm's TinyViT that loops for hours": {
        "architecture": "tiny_vit_5m_224",
        "model_args": {"window_sizes": [60000] * 4},
    },
    "a million groups": {"args": {"block_args": {"scale": 10**6}}},
    "many groups": {"args": {"block_args": {"scale": 60_000}}},
    "a huge width": {"args": {"base_width": 10**9}},
    "no groups": {"args": {"block_args": {"scale": 0}}},
    "huge channels": {"args": {"channels": [16_000] * 4}},
    "many arguments": {"args": {"layers": [1] * 5000}},
    "NaN in an argument": {"args": {"drop_rate": float("nan")}},
}


def refused(in_process: Callable, folder: Path, tmp_path: Path) -> list[str]:
    """Check that loading, verify, publish and predict all refuse a folder in one line; return the lines."""
    name = f"local-dir:{folder}"
    for pretrained in (True, False):
        with pytest.raises(InputError) as caught:
            create_model(name, pretrained)
    lines = [str(caught.value)]
    if not (image := tmp_path / "image.png").exists():
        Image.new("RGB", (64, 64), (200, 30, 90)).save(image)
    result = in_process("hub/verify.py", folder)
    assert result.returncode in (1, 2) and ": passed" not in result.stdout and "Traceback" not in result.stderr
    lines.append(result.stderr or result.stdout)
    lines.append(input_error(in_process("hub/publish.py", folder, "--repo-id", "zoo/x", "--dry-run")))
    lines.append(input_error(in_process("scripts/predict.py", image, "--model", name, "--workers", 0)))
    return lines


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_invalid_config_values_are_refused_everywhere(in_process, folder, tmp_path, key):
    change(folder, json.loads(json.dumps(BAD_CONFIGS[key])))
    start = time.monotonic()
    lines = refused(in_process, folder, tmp_path)
    assert time.monotonic() - start < 40
    assert all("config.json" in line for line in lines), lines
    assert not any(char in line for line in lines for char in "\x1b\x00")


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "null", '"a"', "{}", "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\xff", "NaN"]
)
def test_malformed_configs_are_refused_everywhere(in_process, folder, tmp_path, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert all("config.json" in line for line in refused(in_process, folder, tmp_path))


def put_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_zero(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def put_huge(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 2**40)


@pytest.mark.parametrize("put", [put_fifo, put_zero, put_huge])
def test_endless_config_files(in_process, folder, tmp_path, put):
    put(folder / "config.json")
    assert all("config.json" in line for line in refused(in_process, folder, tmp_path))


@pytest.mark.parametrize("put", [put_fifo, put_zero])
def test_endless_weights(in_process, folder, tmp_path, put):
    put(folder / "model.safetensors")
    assert all("model.safetensors" in line for line in refused(in_process, folder, tmp_path))


@pytest.mark.parametrize("put", [put_fifo, put_zero, put_huge])
@pytest.mark.parametrize("name", ["fingerprint.json", "README.md"])
def test_other_endless_files(in_process, folder, put, name):
    put(folder / name)
    result = in_process("hub/verify.py", folder)
    assert result.returncode in (1, 2) and name in result.stdout + result.stderr
    assert name in input_error(in_process("hub/publish.py", folder, "--repo-id", "zoo/x", "--dry-run"))
    if name == "README.md":
        assert published_accuracies(f"local-dir:{folder}") == []


@pytest.mark.parametrize(
    "readme", ["", "# A model\n\nwithout metadata\n", "---\n- a\n- b\n---\n", "---\n" + "[" * 5000 + "\n---\n", "---\n"]
)
def test_readme_without_metadata_fails(in_process, folder, readme):
    (folder / "README.md").write_text(readme)
    result = in_process("hub/verify.py", folder)
    assert result.returncode == 1 and "card" in result.stdout and "README.md" in result.stdout
    assert "model card" in input_error(in_process("hub/publish.py", folder, "--repo-id", "zoo/x", "--dry-run"))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_weights_of_unsupported_types_fail(in_process, folder, tmp_path, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    assert all("fc.weight" in line for line in refused(in_process, folder, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_precision_pass(in_process, folder, dtype):
    tensors = {
        key: t.to(dtype) if t.is_floating_point() else t for key, t in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    assert create_model(f"local-dir:{folder}").fc.weight.dtype == torch.float32
    assert in_process("hub/verify.py", folder).returncode == 0


def test_tensor_names_with_a_common_prefix(in_process, folder, tmp_path):
    tensors = {f"module.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"their names begin with 'module\.'") as caught:
        create_model(f"local-dir:{folder}")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["link.txt", "sub"])
def test_links_to_outside_are_not_published(in_process, folder, tmp_path, name):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret.txt").write_text("secret")
    (folder / name).symlink_to(tmp_path / "blobs" / ("secret.txt" if "." in name else ""))
    line = input_error(in_process("hub/publish.py", folder, "--repo-id", "zoo/x", "--dry-run"))
    assert f"{name} is a link to a file outside" in line


def test_pipes_are_not_published(in_process, folder):
    (folder / ".eval_results").mkdir()
    os.mkfifo(folder / ".eval_results" / "a.yaml")
    assert "a.yaml: it is a device, a pipe" in input_error(
        in_process("hub/publish.py", folder, "--repo-id", "zoo/x", "--dry-run")
    )


def test_folders_saved_by_timm_load(tmp_path):
    """timm architectures with arguments and other inputs and classes, as safetensors and as a pickle."""
    for number, (name, arguments) in enumerate(
        {
            "resnet10t": dict(num_classes=7),
            "test_convnext": dict(num_classes=3, in_chans=1),
            "test_efficientnet": dict(num_classes=0),
            "test_vit": dict(img_size=96, num_classes=5),
            "res2net_tiny": dict(block_args=dict(scale=2), num_classes=4),
        }.items()
    ):
        model: Any = timm.create_model(name, **arguments).eval()
        folder = tmp_path / str(number)
        if number == 1:
            model.pretrained_cfg |= dict(mean=(0.5,), std=(0.5,))
        timm.models.save_for_hf(model, str(folder), safe_serialization=number != 2)
        loaded: Any = create_model(f"local-dir:{folder}").eval()
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[key])
        x = torch.randn(1, *loaded.pretrained_cfg["input_size"])
        with torch.no_grad():
            assert torch.equal(model(x), loaded(x))
    other: Any = create_model(f"local-dir:{tmp_path / '0'}", num_classes=11, in_chans=1)
    assert other.fc.weight.shape[0] == 11 and other.conv1[0].weight.shape[1] == 1


def test_shapes_are_compared_before_the_model_is_built(folder):
    """A config that does not match the weights must not allocate the memory of its model."""
    import resource

    change(folder, {"architecture": "vit_7b_patch16_dinov3", "model_args": {}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"6,\d+,\d+,\d+ values.*they do not belong together"):
        create_model(f"local-dir:{folder}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("res2net_tiny", dict(layers=(10**6, 1, 1, 1)), "layers is 1000000"),
        ("res2net_tiny", dict(block_args=dict(scale=10**6)), "scale is 1000000"),
        ("res2net50_26w_4s", dict(cardinality=10**7), "cardinality is 10000000"),
        ("res2net50_26w_4s", dict(base_width=10**7), "base_width is 10000000"),
        ("dla60_res2net", dict(levels=(1, 1, 1, 40, 1, 1)), "levels is 40"),
        ("blresnet50", dict(layers=(10**6, 2, 2, 1)), "layers is 1000000"),
        ("seres2next29_6c_24w_4s", dict(layers=(10**6, 1, 1)), "layers is 1000000"),
        ("res2net_tiny", dict(num_classes=10**9), "num_classes is 1000000000"),
    ],
)
def test_create_model_limits_arguments(name, arguments, words):
    start = time.monotonic()
    with pytest.raises(ValueError, match=words):
        timm.create_model(name, **arguments)
    assert time.monotonic() - start < 5


def test_all_architectures_are_within_the_limits():
    with torch.device("meta"), model_config.at_most(model_config.MOST_MODULES):
        for name in ("resnetrs420", "ghostnetv3_050", "res2net200_vd_26w_4s"):
            timm.create_model(name)


def test_repositories_are_checked_like_folders(hub, in_process, folder, tmp_path):
    hub.add("models/zoo/good", folder)
    assert create_model("hf-hub:zoo/good").pretrained_cfg["hf_hub_id"] == "zoo/good"
    asked = len(hub.requests)
    create_model("hf-hub:zoo/good")
    assert len(hub.requests) == asked + 1  # only the commit of main; the rest is cached
    change(folder, {"cfg": {"std": [0, 0, 0], "hf_hub_filename": "README.md"}})
    hub.add("models/zoo/bad", folder)
    for pretrained in (True, False):
        with pytest.raises(InputError, match=r"config\.json: hf_hub_filename is 'README\.md'"):
            create_model("hf-hub:zoo/bad", pretrained)
    assert not [request for request in hub.requests if "zoo/bad" in request and "safetensors" in request]
    assert "hf_hub_filename" in input_error(in_process("hub/verify.py", "zoo/bad"))


def test_unwritable_cache_is_reported(hub, folder, monkeypatch):
    from huggingface_hub import constants

    hub.add("models/zoo/good", folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/nothing/cache")
    with pytest.raises(InputError, match=r"cache /proc/nothing/cache.*set HF_HOME"):
        create_model("hf-hub:zoo/good", cache_dir="/proc/nothing/cache")


@pytest.mark.parametrize(
    "change",
    [
        dict(task=3),
        dict(model="hf-hub:zoo/evil"),
        dict(model="nothing"),
        dict(classes="abc"),
        dict(classes=["a", "a"]),
        dict(img_size=-1),
        dict(img_size=10**7),
        dict(std=[0, 0, 0]),
        dict(mean=[float("nan")] * 3),
        dict(head="evil"),
        dict(head_kwargs={"min_size": 60_000}),
        dict(output_stride=3),
        dict(head_kwargs=[1]),
        dict(head_kwargs={"decoder_channels": [10**6] * 5}),
        dict(head_kwargs={"decoder_channels": [60_000] * 5}),
        dict(classes=[str(i) for i in range(10_000)]),
        dict(model="vit_7b_patch16_dinov3"),
        dict(evil=1),
    ],
    ids=lambda change: str(change)[:60],
)
def test_invalid_task_configs(in_process, tmp_path_factory, change):
    from res2net_zoo import tasks
    from res2net_zoo.weights.card import model_card

    folder = tmp_path_factory.getbasetemp() / "task"
    if not folder.exists():
        model = tasks.task_class("segmentation")("res2net_tiny", ["a", "b"], head="unet", img_size=64)
        model.save(folder, model_card("task", "# task", None))
        assert tasks.load(str(folder)) is not None
    content = (folder / "config.json").read_text()
    try:
        (folder / "config.json").write_text(json.dumps(json.loads(content) | change))
        with pytest.raises(InputError):
            tasks.load(str(folder))
        result = in_process("hub/verify.py", folder)
        assert result.returncode in (1, 2) and ": passed" not in result.stdout
    finally:
        (folder / "config.json").write_text(content)
