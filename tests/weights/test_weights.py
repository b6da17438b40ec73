"""Weights that are not on the Hub: download, verification, conversion, loading by timm; and mirrors."""

import copy
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

from res2net_zoo import catalog
from res2net_zoo.hub.publish import LicenseError, check_license
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.hub_client import TRIES
from res2net_zoo.weights import downloads
from res2net_zoo.weights.convert import convert
from tests.conftest import ROOT, full_disk, input_error, read_tree, spread
from tests.hub_server import Hub, hasten, serve
from tests.weights.test_convert import write

NAME = "res2net50_vd_26w_4s.ssld_in1k"
FILE = "files/originals/resolve/main/original.pdparams"


def to_paddle(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Rename a vd model's tensors as in PaddleClas; test_convert.py verifies the names."""
    from tests.weights.originals.spec import to_paddle as rename

    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    # The first stage's shortcut has no pooling, so the same rule applies to all stages.
    return {rename(k): (v.T if k == "fc.weight" else v).numpy() for k, v in state.items()}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return spread(timm.create_model("res2net50_vd_26w_4s")).eval()


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("original") / "original.pdparams", "paddle", to_paddle(model))


@pytest.fixture
def hub(original, monkeypatch, tmp_path):
    """A server with the original file, a catalogue entry with its URL, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    hasten(monkeypatch)
    with serve({"models/files/originals": {"original.pdparams": original.read_bytes()}}) as server:
        point_to(monkeypatch, server)
        yield server


def point_to(monkeypatch: pytest.MonkeyPatch, hub: Hub, **changes: str) -> None:
    checkpoint = copy.copy(catalog.load().checkpoints[NAME])
    for name, value in {"url": f"{hub.endpoint}/{FILE}", **changes}.items():
        object.__setattr__(checkpoint, name, value)  # bypasses the check for https
    monkeypatch.setitem(catalog.load().checkpoints, NAME, checkpoint)


def count_downloads(hub: Hub) -> int:
    return sum(request.startswith("GET") and "original.pdparams" in request for request in hub.requests)


def converted_file() -> Path:
    (file,) = Path(huggingface_hub.constants.HF_ASSETS_CACHE).rglob("model.safetensors")
    return file


def left_over() -> list[str]:
    folder = Path(huggingface_hub.constants.HF_ASSETS_CACHE)
    names = [path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return [re.sub(r"original-[0-9a-f]{16}\.part", "original.part", name) for name in names]


def test_pretrained_weights_from_the_release(hub, model, original):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="could not be verified; the SHA-256 of the downloaded file is") as caught:
            ours = timm.create_model(NAME, pretrained=True).eval()
        assert sum("could not be verified" in str(w.message) for w in caught) == 1
        assert torch.equal(ours(x), model(x))
        before = count_downloads(hub)
        assert before >= 1 and left_over() == ["model.safetensors"]
        small = timm.create_model(NAME, pretrained=True, num_classes=3, in_chans=1).eval()
        assert small(x[:, :1]).shape == (1, 3)
        assert torch.equal(small.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
        features = timm.create_model("res2net50_vd_26w_4s", pretrained=True, features_only=True).eval()
        assert torch.equal(features(x)[-1], model.forward_features(x))
        assert count_downloads(hub) == before
    with safe_open(converted_file(), "pt") as file:
        metadata = file.metadata()
    assert metadata["source"].endswith("original.pdparams") and metadata["source_sha256"] == downloads.sha256_of(
        original
    )


DETECTOR = "res2net101_v1d_26w_4s.mmdet_htc_coco"


def to_mmdet(name: str) -> str:
    """Return MMDetection's name for a tensor of a backbone."""
    return re.sub(r"^conv1\.", "stem.", re.sub(r"^bn1\.", "stem.7.", name))


@pytest.fixture
def backbone(hub, monkeypatch, tmp_path) -> torch.nn.Module:
    """A backbone, whose detector's file in MMDetection's format is on the server and in the catalogue."""
    model = spread(timm.create_model("res2net101_v1d_26w_4s", num_classes=0)).eval()
    state = {f"backbone.{to_mmdet(name)}": tensor for name, tensor in model.state_dict().items()}
    state |= {"neck.fpn_convs.0.conv.weight": torch.zeros(2, 2), "roi_head.bbox_head.0.fc_cls.bias": torch.zeros(81)}
    torch.save({"meta": {"epoch": 20}, "state_dict": state, "optimizer": {}}, tmp_path / "htc.pth")
    content = (tmp_path / "htc.pth").read_bytes()
    hub.add("models/files/detectors", {"htc.pth": content})
    url, sha256 = f"{hub.endpoint}/files/detectors/resolve/main/htc.pth", hashlib.sha256(content).hexdigest()
    checkpoint = copy.copy(catalog.load().checkpoints[DETECTOR])
    for name, value in {"url": url, "sha256": sha256}.items():
        object.__setattr__(checkpoint, name, value)
    monkeypatch.setitem(catalog.load().checkpoints, DETECTOR, checkpoint)
    return model


@torch.no_grad()
def test_pretrained_backbone_of_a_detector(backbone):
    """Weights without a classifier give a model without one, as timm does for its own, unless classes are given."""
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model(DETECTOR, pretrained=True).eval()
    assert model.num_classes == 0 and isinstance(model.fc, torch.nn.Identity)
    assert model(x).shape == (1, 2048) and torch.equal(model(x), backbone(x))
    features = timm.create_model(DETECTOR, pretrained=True, features_only=True, out_indices=(1, 4), output_stride=16)
    assert features.feature_info.reduction() == [4, 16]
    assert torch.equal(features.eval()(x)[0], backbone.forward_intermediates(x, [1], intermediates_only=True)[0])
    classifier = timm.create_model(DETECTOR, pretrained=True, num_classes=3, in_chans=1).eval()
    assert classifier(x[:, :1]).shape == (1, 3) and classifier.fc.weight.shape == (3, 2048)
    assert torch.equal(classifier.layer4[2].conv3.weight, backbone.layer4[2].conv3.weight)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_backbone_alone_in_mmdetections_format(tmp_path, num_classes):
    """Its classifier, if there is one, belongs to another wiring and is left out."""
    create = partial(timm.create_model, "res2net50_v1d_26w_4s", layers=(1, 1, 1, 1))
    state = spread(create(num_classes=num_classes)).state_dict()
    torch.save({to_mmdet(name): tensor for name, tensor in state.items()}, tmp_path / "b.pth")
    target = create(num_classes=0).state_dict()
    found = convert(tmp_path / "b.pth", "mmdet", target)
    assert found.keys() == target.keys() and all(torch.equal(found[name], state[name]) for name in found)


def test_untrained_models_have_a_classifier_even_if_the_default_weights_have_none():
    with torch.device("meta"):
        assert timm.create_model("res2net101_v1d_26w_4s").num_classes == 1000
        assert timm.create_model("res2net101_v1d_26w_4s", num_classes=7).fc.out_features == 7
        assert timm.create_model(DETECTOR).num_classes == 0


def test_another_cache_dir(hub, tmp_path, recwarn):
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").rglob("model.safetensors")) and not left_over()


def test_interrupted_download_is_resumed_by_the_next_call(hub, original, recwarn):
    hub.cut("original.pdparams", at_byte=60_000_000, reset=True)
    hub.cut("original.pdparams", at_byte=1_000_000, reset=True, times=TRIES - 1)
    with pytest.raises(InputError, match=r"cannot download .*; run it again to continue"):
        timm.create_model(NAME, pretrained=True)
    assert left_over() == ["original.part"] and hub.faults == []
    hub.requests.clear()
    timm.create_model(NAME, pretrained=True)  # one request and its redirect
    assert count_downloads(hub) == 2 and left_over() == ["model.safetensors"]
    with safe_open(converted_file(), "pt") as file:
        assert file.metadata()["source_sha256"] == downloads.sha256_of(original)


@pytest.mark.first_case
@pytest.mark.parametrize("fault", [dict(status=503, times=2), dict(at_byte=60_000_000, reset=True)])
def test_temporary_failures_are_retried(hub, original, recwarn, fault):
    (hub.fail if "status" in fault else hub.cut)("original.pdparams", **fault)
    timm.create_model(NAME, pretrained=True)
    with safe_open(converted_file(), "pt") as file:
        assert file.metadata()["source_sha256"] == downloads.sha256_of(original)


@pytest.mark.full
def test_download_of_a_changed_file_is_restarted(hub, original, recwarn):
    hub.cut("original.pdparams", at_byte=60_000_000, reset=True)
    hub.cut("original.pdparams", at_byte=1_000_000, reset=True, times=TRIES - 1)
    with pytest.raises(InputError, match="run it again"):
        timm.create_model(NAME, pretrained=True)
    content = bytearray(original.read_bytes())
    content[-50:] = content[-50:]  # the tail of a pickle
    place = content.index(b"fc.bias") if b"fc.bias" in content else 50_000_000
    content[place + 5_000] ^= 1
    hub.add("models/files/originals", {"original.pdparams": bytes(content)})
    timm.create_model(NAME, pretrained=True)
    with safe_open(converted_file(), "pt") as file:
        assert file.metadata()["source_sha256"] == hashlib.sha256(content).hexdigest()


def test_secrets_in_urls_are_neither_stored_nor_printed(hub, in_process, original, tmp_path):
    url = f"{hub.endpoint}/{FILE}?signature=hunter2"
    args = ["--model", NAME, "--checkpoint", url, "--output", tmp_path / "out"]
    result = in_process("hub/convert.py", *args)
    assert result.returncode == 0 and "hunter2" not in result.stdout + result.stderr
    assert not any(b"hunter2" in content for content in read_tree(tmp_path / "out").values())
    for wrong in (url.replace("original.pd", "none.pd"), url.replace("http://", "http://me:hunter2@")):
        args[3] = wrong
        assert "hunter2" not in input_error(in_process("hub/convert.py", *args))


@pytest.mark.parametrize("source", ["https://", "http:///x", "/dev/zero", "tests"])
def test_invalid_sources(in_process, tmp_path, source):
    args = ["--model", NAME, "--checkpoint", source, "--output", tmp_path / "out"]
    assert re.search("is not a URL|not a regular file|Is a directory", input_error(in_process("hub/convert.py", *args)))


def test_unwritable_cache(hub, monkeypatch, in_process, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "file" / "assets"))
    args = ["--model", NAME, "--checkpoint", f"{hub.endpoint}/{FILE}", "--output", tmp_path / "out"]
    assert "cannot write into the cache" in input_error(in_process("hub/convert.py", *args))


def test_corrupted_weights_are_detected_before_use(hub, original, monkeypatch):
    point_to(monkeypatch, hub, sha256=downloads.sha256_of(original)[:8])
    hub.corrupt("original.pdparams", at_byte=50_000_000)
    with pytest.raises(InputError, match="is not the released"):
        timm.create_model(NAME, pretrained=True)
    assert left_over() == []
    timm.create_model(NAME, pretrained=True)
    assert left_over() == ["model.safetensors"]


@pytest.mark.parametrize("status", [404, 403, 500])
def test_server_that_refuses(hub, status):
    hub.fail("original.pdparams", status, times=9)
    with pytest.raises(InputError, match="cannot download"):
        timm.create_model(NAME, pretrained=True)
    hub.faults.clear()


@pytest.mark.first_case
@pytest.mark.parametrize("size", [30_000_000, 103_155_000])  # in the download, and in the conversion
def test_a_full_disk(hub, original, size, recwarn):
    with full_disk(size), pytest.raises(InputError, match=r"cannot write .*(File too large|os error 27)"):
        timm.create_model(NAME, pretrained=True)
    assert left_over() == ["original.part"]
    # Only reached if the first part is downloaded again.
    hub.cut("GET .*original.pdparams", at_byte=75_000_000 if size < original.stat().st_size else 1000)
    timm.create_model(NAME, pretrained=True)
    assert hub.faults
    assert left_over() == ["model.safetensors"]


def test_offline_error_names_the_command(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=f"^{NAME} is not in the cache .*; on a machine with a network, `res2net-zoo mirror` "
    ):
        timm.create_model(NAME, pretrained=True)


def test_checkpoints_without_download_are_reported():
    with pytest.raises(
        InputError, match=r"^res2net152d.in1k .*share link.*`res2net-zoo convert`, and load it as local-dir:DIR"
    ):
        timm.create_model("res2net152d.in1k", pretrained=True)


def test_mirror_takes_precedence(hub, monkeypatch, tmp_path, model):
    for name in (NAME, "res2net50_vd_26w_4s.pd_in1k"):
        (tmp_path / "mirror" / name).mkdir(parents=True)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    downloads.save_weights(state, tmp_path / "mirror" / NAME / "model.safetensors", {})
    monkeypatch.setenv("RES2NET_ZOO_MIRROR", str(tmp_path / "mirror"))
    ours = timm.create_model(NAME, pretrained=True)
    assert torch.equal(ours.fc.weight, model.fc.weight) and not hub.requests
    for missing in ("res2net50_vd_26w_4s.pd_in1k", "res2net50_26w_4s.in1k"):
        with pytest.raises(InputError, match=f"has no {missing}/model.safetensors"):
            timm.create_model(missing, pretrained=True)


@pytest.mark.full
def test_concurrent_processes_download_once(hub, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from res2net_zoo import catalog; from res2net_zoo.weights import downloads\n"
        f"checkpoint = catalog.load().checkpoints['{NAME}']\n"
        f"object.__setattr__(checkpoint, 'url', '{hub.endpoint}/{FILE}')\n"
        f"print(downloads.sha256_of(downloads.converted(checkpoint, '{tmp_path / 'cache'}')))\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) for _ in range(4)]
    outputs = {run.communicate(timeout=200)[0] for run in runs}
    assert [run.returncode for run in runs] == [0] * 4 and len(outputs) == 1 and outputs != {""}
    assert sum(request.startswith("GET") and request.endswith(FILE) for request in hub.requests) == 1


@pytest.mark.full
def test_save_weights_is_reproducible(tmp_path):
    script = (
        "import sys, torch; from res2net_zoo.weights.downloads import *; path = Path(sys.argv[1])\n"
        "save_weights({'b': torch.ones(3), 'a': torch.zeros(2, 2)}, path, dict(x='1', y='2', z='3', w='4'))\n"
        "print(sha256_of(path))"
    )
    args = [sys.executable, "-c", script, str(tmp_path / "file")]
    outputs = {subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == dict(format="pt", x="1", y="2", z="3", w="4") and file.get_tensor("b").tolist() == [
            1,
            1,
            1,
        ]


class TestConvertCommand:
    """`res2net-zoo convert`."""

    def test_convert_from_a_file_is_reproducible(self, in_process, original, model, tmp_path):
        folder = tmp_path / "out" / "model"
        args = ["--model", NAME, "--checkpoint", original, "--output", folder]
        contents = []
        for _ in range(2):
            result = in_process("hub/convert.py", *args)
            assert result.returncode == 0, result.stderr
            assert downloads.sha256_of(original) in result.stdout
            contents.append(read_tree(folder))
        weights_and_more = ["README.md", "bom.cdx.json", "config.json", "fingerprint.json", "model.safetensors"]
        assert contents[0] == contents[1] and sorted(contents[0]) == [
            ".eval_results/imagenet-1k.yaml",
            *weights_and_more,
        ]
        ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(ours(x), model(x))
        config = json.loads((folder / "config.json").read_text())
        assert config["architecture"] == "res2net50_vd_26w_4s" and config["pretrained_cfg"]["tag"] == "ssld_in1k"
        card = (folder / "README.md").read_text()
        assert "a file called original.pdparams" in card and "bcebos" not in card  # its origin cannot be verified
        assert "license: apache-2.0" in card and "83.1" in card and "import res2net_zoo" in card

    def test_convert_of_another_file_omits_the_tag(self, in_process, tmp_path):
        """For example weights fine-tuned with the authors' code."""
        model = spread(timm.create_model("dla60_res2next")).eval()
        torch.save(model.state_dict(), tmp_path / "mine.pth")
        args = ["--model", "dla60_res2next.in1k", "--checkpoint", tmp_path / "mine.pth", "--output", tmp_path / "out"]
        result = in_process("hub/convert.py", *args)
        assert result.returncode == 0 and "different from dla60_res2next.in1k" in result.stdout
        (warning,) = result.stderr.splitlines()
        assert warning.startswith("warning: ") and "is not the released dla60_res2next.in1k" in warning
        ours = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(ours(x), model(x))
        config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
        assert not config.keys() & {"tag", "license", "origin_url", "hf_hub_id"}
        card = (tmp_path / "out" / "README.md").read_text()
        assert "license:" not in card and "78.4" not in card and not (tmp_path / "out" / ".eval_results").exists()
        assert in_process("hub/verify.py", tmp_path / "out").returncode == 0
        with pytest.raises(LicenseError, match="states no licence"):
            check_license(tmp_path / "out")

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--model", "res2net50_vd_26w_4s.ssld"], "did you mean res2net50_vd_26w_4s.ssld_in1k"),
            (["--model", "res2net152d.in1k"], "name its file with --checkpoint"),
            (["--model", NAME, "--checkpoint", "no/such/file"], "cannot read no/such/file: No such file"),
            (["--model", NAME, "--checkpoint", "README.md"], "README.md"),
            (["--model", "res2net50_26w_4s.in1k", "--checkpoint", "README.md"], "is not the released"),
            (["--model", "res2net50_26w_4s.in1k", "--checkpoint", "README.md"], "without its tag (--model)"),
        ],
    )
    def test_bad_input_writes_nothing(self, in_process, args, words, tmp_path):
        assert words in input_error(in_process("hub/convert.py", *args, "--output", tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.full
    def test_convert_from_a_url_resumes_after_a_full_disk(self, hub, in_process, original, tmp_path):
        url, out = f"{hub.endpoint}/{FILE}", tmp_path / "out" / "model"
        args = ["--model", NAME, "--checkpoint", url, "--output", out]
        with full_disk(30_000_000):
            assert "free some space and run it again to continue" in input_error(in_process("hub/convert.py", *args))
        with full_disk(103_155_000):
            line = input_error(in_process("hub/convert.py", *args))
        assert f"cannot write {out}" in line and not list((tmp_path / "out").iterdir())
        assert in_process("hub/convert.py", *args).returncode == 0
        with safe_open(out / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata == {
            "converter": "1",
            "format": "pt",
            "source": url,
            "source_sha256": downloads.sha256_of(original),
        }
        # An old folder is kept if the new one cannot be written.
        before = read_tree(out)
        with full_disk(50_000_000):
            input_error(in_process("hub/convert.py", "--model", NAME, "--checkpoint", original, "--output", out))
        assert read_tree(out) == before

    @pytest.mark.full
    def test_convert_from_a_url_resumes_after_sigkill(self, hub, original, tmp_path):
        """A download is resumed after kill -9."""
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ASSETS_CACHE": str(tmp_path / "assets")}
        url = f"{hub.endpoint}/{FILE}"
        command = [sys.executable, "hub/convert.py", "--model", NAME, "--checkpoint", url, "--output"]
        hub.cut("original.pdparams", at_byte=70_000_000)  # the client then waits one second
        run = subprocess.Popen([*command, tmp_path / "out"], cwd=ROOT, env=env)
        parts: list[Path] = []
        while not (parts and parts[0].stat().st_size > 50_000_000):
            assert run.poll() is None
            parts = list((tmp_path / "assets").rglob("original-*.part"))
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.wait()
        done = parts[0].stat().st_size
        assert not (tmp_path / "out").exists() and done < original.stat().st_size
        hub.faults.clear()
        hub.cut(
            "original.pdparams", at_byte=original.stat().st_size - 40_000_000
        )  # only reached if everything is sent again
        subprocess.run([*command, tmp_path / "out"], cwd=ROOT, env=env, check=True, timeout=100)
        assert hub.faults and (tmp_path / "out" / "model.safetensors").exists()

    def test_help_is_fast(self):
        run = subprocess.run(
            [sys.executable, "hub/convert.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=3
        )
        assert run.returncode == 0 and "--checkpoint" in run.stdout
