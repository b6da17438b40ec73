"""Licence and origin in folders, cards, exported files and `publish`, for all ways to create weights."""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.models import generate_default_cfgs, register_model

from res2net_zoo import catalog
from res2net_zoo.catalog import pretrained_cfgs
from res2net_zoo.hub.publish import LicenseError, check_license
from res2net_zoo.inference import export
from res2net_zoo.models import res2net
from res2net_zoo.utils.files import sha256_of
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from res2net_zoo.weights.pretrained import create_model
from res2net_zoo.weights.provenance import of_folder, of_model
from tests.conftest import SHIPPED_MODEL, SMALL, input_error, save_images, spread
from tests.hub.test_hub import publish  # noqa: F401  a fixture
from tests.scenes import save_voc

FINETUNE, EXPORT, CONVERT, VERIFY, TASK = (
    f"{path}.py" for path in ("scripts/finetune", "scripts/export", "hub/convert", "hub/verify", "scripts/train_task")
)
NAME, URL, HUB_ID, LICENSE = "res2net_tiny.own_in1k", "https://example.org/tiny.pth", "zoo/tiny", "cc-by-nc-sa-4.0"
RELEASE = """
[[checkpoints]]
architecture = "res2net_tiny"
tag = "own_in1k"
released_by = "the authors"
url = "{url}"
sha256 = "{sha256}"
format = "torch"
hub_id = "{hub_id}"
hub_sha256 = ""
license = "CC-BY-NC-SA-4.0"
license_note = ""
input_size = [3, 64, 64]
crop_pct = 0.875
interpolation = "bilinear"
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
num_classes = 10
notes = ""
accuracies = []
"""
# timm's cfg of a checkpoint.
CLAIMS = {"url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "license", "origin_url", "description"}
QUICK = ["--epochs", 1, "--batch-size", 4, "--workers", 0, "--tracker", "none", "--no-check", "--steps-per-epoch", 1]
QUICK += ["--img-size", 32, "--ema", 0]


def register(entrypoint: Any) -> None:
    res2net.default_cfgs["res2net_tiny"] = generate_default_cfgs(
        {name: cfg for name, cfg in pretrained_cfgs().items() if name.partition(".")[0] == "res2net_tiny"}
    )["res2net_tiny"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm warns that it replaces registered models
        register_model(entrypoint)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Iterator[Path]:
    """A released file of res2net_tiny, which is added to the catalogue."""
    folder = tmp_path_factory.mktemp("release")
    model = spread(timm.create_model("res2net_tiny", num_classes=10))
    torch.save(model.state_dict(), folder / "tiny.pth")
    entry = RELEASE.format(url=URL, sha256=sha256_of(folder / "tiny.pth"), hub_id=HUB_ID)
    (folder / "catalog.toml").write_text(catalog.path().read_text() + entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "path", lambda: folder / "catalog.toml")
        catalog.load.cache_clear()
        register(res2net.res2net_tiny)
        assert timm.get_pretrained_cfg_value("res2net_tiny", "license") == LICENSE
        yield folder / "tiny.pth"
    catalog.load.cache_clear()
    register(res2net.res2net_tiny)


@pytest.fixture
def mirror(release, in_process, tmp_path, monkeypatch) -> Path:
    """A mirror with the release, created by `hub/convert.py` and read by `pretrained=True`."""
    folder = tmp_path / "mirror" / NAME
    done = in_process(CONVERT, "--model", NAME, "--checkpoint", release, "--output", folder)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("RES2NET_ZOO_MIRROR", str(folder.parent))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for split in ("train", "val"):
        save_images(folder / split, ["cat", "dog"], 4)
    return folder


@pytest.fixture
def finetune(in_process, pictures, tmp_path):
    def run(name: str, *args: object) -> Path:
        done = in_process(FINETUNE, *QUICK, "--data", pictures, "--output", tmp_path / name, *args)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return run


def stated(folder: Path) -> dict[str, Any]:
    """Return licence and origin of a folder, after checking that config.json, card and `verify` agree."""
    config, card = json.loads((folder / "config.json").read_text()), ModelCard.load(folder / "README.md").data
    record = config.get("provenance", {})
    assert record.get("license") == card.get("license") and record.get("base_model") == card.get("base_model")
    if "pretrained_cfg" in config:
        assert config["pretrained_cfg"].get("license") == record.get("license")
    return record


def claims(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    return {key: config[key] for key in sorted(config.keys() & CLAIMS)}


def exported(in_process, model: str, output: Path) -> dict[str, Any]:
    """Return licence and origin in an exported file."""
    export_format = next(name for name, suffix in export.FORMATS.items() if suffix == output.suffix)
    done = in_process(EXPORT, "--model", model, "--format", export_format, "--output", output)
    assert done.returncode == 0, done.stderr
    if export_format == "onnx":
        return origin_in({entry.key: entry.value for entry in onnx.load(output).metadata_props})
    return origin_in(export.openvino_core().read_model(output).get_rt_info("res2net_zoo").value)


def described(folder: Path) -> dict[str, Any]:
    """Return licence and origin in an export of a folder."""
    name = f"local-dir:{folder}"
    model = create_model(name)
    return origin_in(export.export_metadata(model, name, origin=of_model(name, model.pretrained_cfg)))  # type: ignore[arg-type]


def origin_in(facts: dict[str, str]) -> dict[str, Any]:
    return {key: facts.get(key) for key in ("license", "base_model")} | json.loads(facts["provenance"])


def release_record(release: Path, **more: Any) -> dict[str, Any]:
    """Return the record of the release, if it comes from the catalogue's URL."""
    return {
        "origin": "checkpoint",
        "trained": False,
        "checkpoint": NAME,
        "source": URL,
        "source_sha256": sha256_of(release),
        "license": LICENSE,
    } | more


class TestFromScratch:
    @pytest.mark.first_case
    @pytest.mark.parametrize("license", [None, "mit"])
    def test_only_stated_facts_are_recorded(self, release, finetune, in_process, tmp_path, license):
        """Published weights of the architecture have a licence, a URL and a repository, which must not be recorded."""
        given = {} if license is None else {"license": license}
        folder = finetune("scratch", "--model", "res2net_tiny", *([] if license is None else ["--license", license]))
        assert stated(folder) == {"origin": "random", "trained": True, **given} and claims(folder) == given
        assert not re.search(f"{LICENSE}|{URL}|{HUB_ID}", (folder / "config.json").read_text())
        assert "come from" not in (folder / "README.md").read_text()
        facts = (
            exported(in_process, f"local-dir:{folder}", tmp_path / "m.onnx") if license is None else described(folder)
        )
        assert facts == {"license": license, "base_model": None, "origin": "random", "trained": True, **given}
        if license is None:
            with pytest.raises(LicenseError, match="states no licence"):
                check_license(folder)
        else:
            check_license(folder)

    @pytest.mark.full
    def test_the_authors_architecture(self, finetune):
        folder = finetune("scratch", "--model", "res2net50_26w_4s")
        assert stated(folder) == {"origin": "random", "trained": True} and not claims(folder)
        text = (folder / "config.json").read_text()
        assert "cc-by" not in text and "http" not in text and "timm/" not in text and "arXiv:1904.01169" in text
        assert described(folder) == {"license": None, "base_model": None, "origin": "random", "trained": True}

    def test_papers_of_timm_weights(self, tmp_path):
        """Papers of other timm models describe the training of published weights."""
        model = timm.create_model("resnet18", num_classes=2)
        assert model.pretrained_cfg["paper_ids"] and model.pretrained_cfg["license"]
        write_model_folder(tmp_path / "m", model, model_card("m", "# m", None))
        assert not claims(tmp_path / "m")
        assert "paper_ids" not in json.loads((tmp_path / "m" / "config.json").read_text())["pretrained_cfg"]

    def test_architecture_of_a_folder_without_its_weights(self, mirror, finetune):
        folder = finetune("scratch", "--model", f"local-dir:{mirror}", "--no-pretrained")
        assert stated(folder) == {"origin": "random", "trained": True} and not claims(folder)


class TestFromACheckpoint:
    def test_provenance_after_repeated_fine_tuning(self, mirror, release, finetune, in_process, tmp_path):
        # Converted from the released file, identified by its hash.
        assert stated(mirror) == release_record(release, repository=HUB_ID)
        assert claims(mirror) == {"license": LICENSE, "origin_url": URL, "tag": "own_in1k"}
        assert described(mirror) == {**release_record(release, repository=HUB_ID), "base_model": HUB_ID}
        assert in_process(VERIFY, mirror).returncode == 0
        # By its name, from the mirror.
        folder = finetune("tuned", "--model", "res2net_tiny", "--pretrained")
        derived = {"trained": True, "base_model": HUB_ID, "inherited_license": LICENSE}
        expected = release_record(release, start="res2net_tiny", **derived)
        assert stated(folder) == expected and claims(folder) == {"license": LICENSE, "origin_url": URL}
        facts = exported(in_process, f"local-dir:{folder}", tmp_path / "m.xml")
        assert facts == expected
        assert "trained from pretrained weights" in (folder / "README.md").read_text()
        assert (
            f"Origin of the weights: the checkpoint {NAME} ({URL}), trained from res2net_tiny"
            in ModelCard.load(folder / "README.md").text
        )
        check_license(folder)
        # From the folder with its record.
        again = finetune("again", "--model", f"local-dir:{folder}", "--pretrained")
        assert stated(again) == release_record(release, start="tuned", **derived)
        assert str(tmp_path) not in (again / "config.json").read_text()
        done = in_process(VERIFY, again)
        assert done.returncode == 0 and f"trained from tuned, base model {HUB_ID}, licence {LICENSE}" in done.stdout

    def test_licence_that_differs_from_the_inherited_one(self, mirror, release, in_process, pictures, tmp_path):
        args = [*QUICK, "--data", pictures, "--model", NAME, "--pretrained", "--license", "mit"]
        done = in_process(FINETUNE, *args, "--output", tmp_path / "mit")
        (line,) = [line for line in done.stderr.splitlines() if "licence" in line]
        assert done.returncode == 0 and line.startswith(f"warning: the licence mit replaces {LICENSE}, ")
        record = stated(tmp_path / "mit")
        assert (record["license"], record["inherited_license"], record["start"]) == ("mit", LICENSE, NAME)
        assert claims(tmp_path / "mit")["license"] == "mit"
        with pytest.raises(LicenseError, match=f"states the licence mit, but .* have {LICENSE}"):
            check_license(tmp_path / "mit")

    def test_file_that_differs_from_the_release(self, release, finetune, in_process, tmp_path):
        torch.save(spread(timm.create_model("res2net_tiny", num_classes=10), seed=1).state_dict(), tmp_path / "my.pth")
        folder = tmp_path / "mine"
        args = ["--model", NAME, "--checkpoint", tmp_path / "my.pth", "--output", folder]
        assert in_process(CONVERT, *args).returncode == 0
        record = {"origin": "file", "trained": False, "source": "a file called my.pth"}
        record["source_sha256"] = sha256_of(tmp_path / "my.pth")
        assert stated(folder) == record and not claims(folder)
        assert described(folder) == {**record, "license": None, "base_model": None}
        tuned = finetune("tuned", "--model", f"local-dir:{folder}", "--pretrained")
        assert stated(tuned) == {**record, "trained": True, "start": "mine"} and not claims(tuned)

    def test_mirror_with_a_different_file(self, release, in_process, tmp_path, monkeypatch):
        torch.save(spread(timm.create_model("res2net_tiny", num_classes=10), seed=1).state_dict(), tmp_path / "my.pth")
        args = ["--model", NAME, "--checkpoint", tmp_path / "my.pth", "--output", tmp_path / "mirror" / NAME]
        assert in_process(CONVERT, *args).returncode == 0
        monkeypatch.setenv("RES2NET_ZOO_MIRROR", str(tmp_path / "mirror"))
        record = of_model(NAME, create_model(NAME).pretrained_cfg)  # type: ignore[arg-type]
        assert (record.origin, record.license, record.repository) == ("file", None, None)

    def test_file_without_a_published_hash(self, in_process, tmp_path):
        """It cannot be verified against the release."""
        from tests.weights.test_convert import write
        from tests.weights.test_weights import to_paddle

        name = "res2net50_vd_26w_4s.ssld_in1k"
        model = spread(timm.create_model("res2net50_vd_26w_4s"))
        file = write(tmp_path / "original.pdparams", "paddle", to_paddle(model))
        assert in_process(CONVERT, "--model", name, "--checkpoint", file, "--output", tmp_path / "m").returncode == 0
        record = stated(tmp_path / "m")
        assert (record["checkpoint"], record["source"]) == (name, "a file called original.pdparams")
        assert claims(tmp_path / "m") == {"license": "apache-2.0", "tag": "ssld_in1k"}

    def test_licence_that_may_not_cover_the_weights(self, tmp_path):
        """It may not cover derived weights either."""
        checkpoint = catalog.load().checkpoints["res2net50_26w_4s.in1k"]
        model = timm.create_model("res2net_tiny", num_classes=10)
        origin = of_model(checkpoint.name, dict(architecture=checkpoint.architecture, tag=checkpoint.tag))
        origin = origin.after_training(checkpoint.name)
        card = model_card("m", "# m", origin.license, base_model=origin.base_model)
        write_model_folder(tmp_path / "m", model, card, origin=origin)
        assert stated(tmp_path / "m")["base_model"] == "timm/res2net50_26w_4s.in1k"
        with pytest.raises(
            LicenseError, match=r"derives from res2net50_26w_4s.in1k, whose licence may not cover its weights"
        ):
            check_license(tmp_path / "m")

    @pytest.mark.parametrize(("tag", "license"), [("a1_in1k", "apache-2.0"), ("fb_swsl_ig1b_ft_in1k", "cc-by-nc-4.0")])
    def test_timm_checkpoint(self, tag, license):
        config = timm.create_model(f"resnet18.{tag}").pretrained_cfg
        record = of_model(f"resnet18.{tag}", config)
        assert (record.checkpoint, record.repository, record.license) == (
            f"resnet18.{tag}",
            f"timm/resnet18.{tag}",
            license,
        )
        assert of_model(f"resnet18.{tag}", config, pretrained=False).to_dict() == {"origin": "random", "trained": False}


class TestFromAFolder:
    def test_shipped_model(self, finetune, in_process, tmp_path):
        own = {"origin": "random", "trained": True, "license": "apache-2.0"}
        assert stated(SHIPPED_MODEL) == own and in_process(VERIFY, SHIPPED_MODEL).returncode == 0
        assert described(SHIPPED_MODEL) == {**own, "base_model": None}
        folder = finetune("tuned", "--model", f"local-dir:{SHIPPED_MODEL}", "--pretrained")
        more = {"start": "res2net_tiny.digits", "inherited_license": "apache-2.0"}
        assert stated(folder) == {**own, **more} and claims(folder) == {"license": "apache-2.0"}

    def test_distilled(self, finetune):
        """The initial weights of the student are recorded, and its teacher is named."""
        teacher = finetune("teacher", "--model", "res2net_tiny", "--license", "apache-2.0")
        args = ["--model", "res2net_tiny", "--recipe", "distill", "--teacher", f"local-dir:{teacher}"]
        student = finetune("student", *args)
        assert stated(student) == {"origin": "random", "trained": True, "teacher": "teacher"}
        assert (
            "random initialization, trained, teacher teacher, licence not stated" in (student / "README.md").read_text()
        )

    def test_hub_repository(self, hub, finetune, publish, tmp_path):  # noqa: F811
        hub.add("models/zoo/digits", SHIPPED_MODEL)
        folder = finetune("tuned", "--model", "hf-hub:zoo/digits", "--pretrained")
        record = stated(folder)
        assert (record["base_model"], record["start"], record["license"]) == ("zoo/digits", "zoo/digits", "apache-2.0")
        done = publish(folder, "--repo-id", "zoo/tuned", "--dry-run")
        assert done.returncode == 0 and "would send" in done.stdout, done.stderr
        card = (folder / "README.md").read_text()
        (folder / "README.md").write_text(card.replace("license: apache-2.0", "license: mit"))
        words = "states the licence mit, its config.json apache-2.0"
        assert words in publish(folder, "--repo-id", "zoo/tuned", "--dry-run").stdout
        assert words in input_error(publish(folder, "--repo-id", "zoo/tuned"))

    @pytest.mark.first_case
    @pytest.mark.parametrize("license", [None, "apache-2.0"])
    def test_folder_saved_by_timm(self, release, finetune, in_process, tmp_path, license):
        """timm writes licence and tag of published weights for any weights; only the folder's card is used."""
        model = spread(timm.create_model("res2net_tiny", num_classes=10))
        timm.models.save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
        assert claims(tmp_path / "saved")["license"] == LICENSE
        if license:
            (tmp_path / "saved/README.md").write_text(f"---\nlicense: {license}\nbase_model: zoo/other\n---\n# saved\n")
        given = {"license": license, "base_model": "zoo/other"} if license else {"license": None, "base_model": None}
        assert described(tmp_path / "saved") == {**given, "origin": "unknown", "trained": False}
        folder = finetune("tuned", "--model", f"local-dir:{tmp_path / 'saved'}", "--pretrained")
        record = {"origin": "unknown", "trained": True, "start": "saved", **{k: v for k, v in given.items() if v}}
        assert stated(folder) == record | ({"inherited_license": license} if license else {})
        assert claims(folder) == ({"license": license} if license else {})

    def test_folder_converted_by_an_earlier_version(self, mirror, release):
        config = json.loads((mirror / "config.json").read_text())
        del config["provenance"]
        (mirror / "config.json").write_text(json.dumps(config))
        assert of_folder(mirror).to_dict() == release_record(release, repository=HUB_ID)

    def test_licence_added_to_the_card(self, finetune):
        """As suggested by `publish`."""
        folder = finetune("scratch", "--model", "res2net_tiny")
        card = ModelCard.load(folder / "README.md")
        card.data.license = "mit"
        card.save(folder / "README.md")
        check_license(folder)
        assert of_folder(folder).license == "mit"

    def test_random_weights_have_no_provenance(self, tmp_path):
        name = "seres2next29_6c_24w_4s"
        write_model_folder(tmp_path / "m", timm.create_model(name, **SMALL[name]), model_card("m", "# m", None))
        assert stated(tmp_path / "m") == {} and not claims(tmp_path / "m")


def test_task_model_and_its_backbone(mirror, release, in_process, tmp_path):
    voc = save_voc(tmp_path / "voc", train=4, val=2)
    args = ["--task", "segmentation", "--head", "unet", "--img-size", 64, "--workers", 0, "--threads", 1, "--epochs", 1]
    args += ["--data", voc, "--batch-size", 4]
    start = ["--model", "res2net_tiny", "--pretrained"]
    for name, options, expected in (
        (
            "tuned",
            start,
            release_record(release, trained=True, start="res2net_tiny", base_model=HUB_ID, inherited_license=LICENSE),
        ),
        ("scratch", ["--model", "res2net_tiny"], {"origin": "random", "trained": True}),
    ):
        folder = tmp_path / name
        done = in_process(TASK, *args, *options, "--output", folder)
        assert done.returncode == 0, done.stderr
        assert stated(folder) == expected and str(of_folder(folder)) in in_process(VERIFY, folder).stdout
        backbone = json.loads((folder / "backbone/config.json").read_text())
        assert backbone["provenance"] == expected
        kept = {"license": LICENSE, "origin_url": URL} if name == "tuned" else {}
        assert claims(folder / "backbone") == kept
    facts = described(tmp_path / "tuned/backbone")
    assert (facts["license"], facts["base_model"], facts["source"]) == (LICENSE, HUB_ID, URL)
    with pytest.raises(LicenseError, match="states no licence"):
        check_license(tmp_path / "scratch")
    # The backbone starts another task, with its record.
    done = in_process(
        TASK, *args, "--model", f"local-dir:{tmp_path / 'tuned/backbone'}", "--pretrained", "--output", tmp_path / "2"
    )
    assert done.returncode == 0, done.stderr
    record = stated(tmp_path / "2")
    assert (record["license"], record["base_model"], record["start"]) == (LICENSE, HUB_ID, "backbone")


class TestHostileRecords:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "tiny"))

    def spoil(self, folder: Path, record: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"provenance": record}))

    @pytest.mark.first_case
    @pytest.mark.parametrize(
        ("record", "words"),
        [
            (dict(license="mit\x1b[2Jowned"), "license must be 1 to 500 printable characters"),
            (dict(license="mit\nlicense: x"), "license must be"),
            (dict(license=""), "license must be"),
            (dict(license="x" * 501), "license must be"),
            (dict(license=3), "license must be 1 to 500 printable characters, not of type int"),
            (dict(license=["mit"]), "not of type list"),
            (dict(license={"a": {}}), "not of type dict"),
            (dict(base_model="../../x/y"), "base_model must be a repository id ORG/NAME"),
            (dict(repository=True), "repository must be"),
            (dict(source_sha256="xyz"), "source_sha256 must be the hexadecimal digits"),
            (dict(trained="yes"), "trained must be true or false"),
            (dict(origin="heaven"), "origin must be one of random, checkpoint, file, unknown"),
            (dict(origin=["random"]), "origin must be one of"),
            (dict(origin="random", checkpoint="a.b"), "have no checkpoint"),
            (dict(origin="checkpoint"), "need the checkpoint's name"),
            (dict(start="\u202egnp"), "start must be"),
            ([], "provenance must be an object, not of type list"),
            (None, "provenance must be an object"),
            ("random", "provenance must be an object, not 'random'"),
        ],
        ids=str,
    )
    def test_invalid_records_are_refused(self, in_process, folder, record, words):
        self.spoil(folder, {"origin": "random", **record} if isinstance(record, dict) else record)
        line = input_error(in_process(VERIFY, folder))
        assert words in line and str(folder / "config.json") in line and line.isprintable()

    def test_invalid_records_are_refused_by_all_programs(self, hub, in_process, publish, pictures, folder, tmp_path):  # noqa: F811
        self.spoil(folder, dict(origin="random", license="mit\x1b[2J"))
        start = ["--model", f"local-dir:{folder}"]
        for program, args in (
            (FINETUNE, [*start, *QUICK, "--pretrained", "--data", pictures, "--output", tmp_path / "out"]),
            (EXPORT, [*start, "--format", "onnx", "--output", tmp_path / "m.onnx"]),
        ):
            line = input_error(in_process(program, *args))
            assert "provenance: license must be" in line and line.isprintable()
        assert not (tmp_path / "m.onnx").exists() and not (tmp_path / "out").exists()
        assert "provenance: license must be" in input_error(publish(folder, "--repo-id", "zoo/x", "--dry-run"))

    def test_unknown_fields_are_ignored(self, folder):
        self.spoil(folder, dict(origin="random", license="mit", of_a_later_version=[1]))
        assert of_folder(folder).license == "mit"

    @pytest.mark.parametrize("card", ["license: 3", "license: [mit, x]", 'license: "a\\eb"', "license: unknown", ": ["])
    def test_card_without_a_valid_licence(self, tmp_path, card):
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
        assert of_folder(tmp_path).to_dict() == {"origin": "unknown", "trained": False}

    @pytest.mark.parametrize("license", ["a\nb", "\x07"])
    def test_licence_option(self, in_process, pictures, tmp_path, license):
        done = in_process(FINETUNE, *QUICK, "--data", pictures, "--license", license, "--output", tmp_path / "m")
        assert "license must be" in input_error(done) and not (tmp_path / "m").exists()
