"""publish, verify and mirror: the real client and `hf` with a test Hub and injected faults."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import timm
import torch
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load_file

from res2net_zoo import catalog
from res2net_zoo.hub import publish as publishing
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import sha256_of
from res2net_zoo.weights import bill_of_materials, fingerprint
from res2net_zoo.weights.downloads import save_weights
from tests.conftest import ROOT, SHIPPED_MODEL, full_disk, input_error, read_tree
from tests.hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN, Hub, serve
from tests.weights.test_weights import NAME, model, original  # noqa: F401  fixtures

KEY, REPO = "models/zoo/tiny", "zoo/tiny"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder as written by finetune.py: a copy of the shipped one."""
    return Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "tiny"))


@pytest.fixture
def publish(in_process, hub):
    """Runs `hub/publish.py`, and checks that no token is printed."""

    def run(*args: object) -> subprocess.CompletedProcess:
        result = in_process("hub/publish.py", *args)
        assert not any(token in result.stdout + result.stderr for token in (TOKEN, OTHER_TOKEN, READ_TOKEN))
        return result

    return run


def change_weights(folder: Path) -> None:
    """Change the weights of a folder and update its fingerprint and bill of materials."""
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.bias"] = tensors["fc.bias"] + 1
    save_weights(tensors, folder / "model.safetensors", {})
    fingerprint.write(folder)
    bill_of_materials.write(folder)


def commits(hub: Hub, key: str = KEY) -> list[str]:
    return [commit.title for commit in hub.commits(key)]


def writes(hub: Hub) -> list[str]:
    """Return the requests that write."""
    harmless = ("/preupload/", "/validate-yaml", "/objects/batch", "/paths-info/", "/verify")
    return [r for r in hub.requests if not r.startswith(("GET", "HEAD")) and not any(word in r for word in harmless)]


class TestPublish:
    def test_publishing_is_one_commit_and_idempotent(self, hub, publish, folder):
        result = publish(folder, "--repo-id", REPO)
        assert result.returncode == 0, result.stderr
        files = read_tree(folder)
        assert hub.files(KEY) == {**files, ".gitattributes": hub.files(KEY)[".gitattributes"]}
        assert len(commits(hub)) == 2 and re.fullmatch(
            rf"Upload tiny, {len(files)} files \([0-9a-f]{{10}}\)", commits(hub)[0]
        )
        assert f"published: {hub.endpoint}/{REPO}/commit/{hub.sha(KEY)}" in result.stdout
        (collection,) = hub.collections.values()
        assert collection["title"] == "Res2Net Zoo" and [item["id"] for item in collection["items"]] == [REPO]
        hub.requests.clear()
        again = publish(folder, "--repo-id", REPO)
        assert again.returncode == 0 and "is up to date" in again.stdout
        assert len(commits(hub)) == 2 and not [r for r in writes(hub) if "/collections/" not in r]
        # Only changed files are uploaded, in another commit.
        (folder / "metrics.csv").write_text("epoch\n")
        (folder / "notes.txt").write_text("new\n")
        hub.requests.clear()
        assert publish(folder, "--repo-id", REPO).returncode == 0
        assert len(commits(hub)) == 3 and "2 files" in commits(hub)[0] and not [r for r in writes(hub) if "PUT" in r]

    def test_dry_run_lists_the_upload_and_sends_nothing(self, hub, publish, folder):
        result = publish(folder, "--repo-id", REPO, "--dry-run")
        assert result.returncode == 0 and not writes(hub) and not hub.repositories
        rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in result.stdout.splitlines() if "|" in line]
        expected = [
            [path, f"{len(content):,}", sha256_of(folder / path)[:16], "new"]
            for path, content in sorted(read_tree(folder).items())
        ]
        assert rows[2:] == expected
        number = len(read_tree(folder))
        assert (
            f"would send {number} of {number} files to the new public zoo/tiny in one commit to main" in result.stdout
        )
        publish(folder, "--repo-id", REPO)
        hub.requests.clear()
        (folder / "metrics.csv").write_text("epoch\n")
        result = publish(folder, "--repo-id", REPO, "--dry-run")
        assert not writes(hub) and f"would send 1 of {number} files to the public zoo/tiny" in result.stdout
        assert [line.split("|")[1].strip() for line in result.stdout.splitlines() if "changed" in line.split()] == [
            "metrics.csv"
        ]

    def test_dry_run_announces_a_new_bill_of_materials(self, hub, publish, folder):
        line = "would write the folder's bill of materials, bom.cdx.json, before"
        assert line not in publish(folder, "--repo-id", REPO, "--dry-run").stdout
        card = folder / "README.md"
        card.write_text(card.read_text() + "\nMore.\n")
        before = read_tree(folder)
        assert line in publish(folder, "--repo-id", REPO, "--dry-run").stdout and read_tree(folder) == before
        assert publish(folder, "--repo-id", REPO).returncode == 0
        assert read_tree(folder)["bom.cdx.json"] != before["bom.cdx.json"]

    def test_hidden_files_are_not_uploaded(self, hub, publish, folder):
        for name in (".cache/huggingface/download/x.metadata", ".git/config", "model.safetensors.0123.part", ".env"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        assert publish(folder, "--repo-id", REPO).returncode == 0
        assert set(hub.files(KEY)) == {*read_tree(SHIPPED_MODEL), ".gitattributes"}

    def test_different_weights_are_not_overwritten_without_force(self, hub, publish, folder):
        publish(folder, "--repo-id", REPO)
        before = hub.sha(KEY)
        change_weights(folder)
        for more in ([], ["--dry-run"]):
            line = input_error(publish(folder, "--repo-id", REPO, *more))
            assert "different model.safetensors" in line and "--force" in line and hub.sha(KEY) == before
        assert publish(folder, "--repo-id", REPO, "--force").returncode == 0
        assert hub.files(KEY)["model.safetensors"] == (folder / "model.safetensors").read_bytes()

    @pytest.mark.full
    def test_different_weights_on_a_new_branch(self, hub, publish, folder):
        publish(folder, "--repo-id", REPO)
        before = hub.sha(KEY)
        change_weights(folder)
        assert publish(folder, "--repo-id", REPO, "--revision", "v2").returncode == 0
        assert hub.sha(KEY) == before and hub.commits(KEY, "v2")[0].parent == before
        assert hub.files(KEY, "v2")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        change_weights(folder)
        hub.fail("POST .*/commit/v3")
        assert publish(folder, "--repo-id", REPO, "--revision", "v3").returncode == 0 and not hub.faults
        change_weights(folder)  # now different weights could be overwritten
        assert "at v2" in input_error(publish(folder, "--repo-id", REPO, "--revision", "v2"))

    def test_concurrent_commit_of_weights(self, hub, publish, folder):
        hub.add(KEY, {"README.md": "# theirs"})
        theirs = {"model.safetensors": b"theirs"}
        hub.before("POST .*/commit/", lambda: hub.commit(KEY, theirs, author="other"))
        assert "different model.safetensors" in input_error(publish(folder, "--repo-id", REPO))
        assert hub.files(KEY)["model.safetensors"] == b"theirs"

    def test_concurrent_commit_of_other_files(self, hub, publish, folder):
        hub.add(KEY, {"README.md": "# theirs"})
        hub.before("POST .*/commit/", lambda: hub.commit(KEY, {"theirs.txt": b"1"}, author="other"))
        assert publish(folder, "--repo-id", REPO).returncode == 0
        assert hub.files(KEY) == {**read_tree(folder), "theirs.txt": b"1"} and len(commits(hub)) == 3

    def test_pull_request_is_idempotent(self, hub, publish, folder):
        hub.add("models/other/tiny", {"README.md": "# theirs", "model.safetensors": b"theirs"})
        for words in ("proposed: ", "already proposed: "):
            result = publish(folder, "--repo-id", "other/tiny", "--create-pr")
            assert result.returncode == 0, result.stderr
            assert f"{words}{hub.endpoint}/other/tiny/discussions/1" in result.stdout
        assert len(hub.repositories["models/other/tiny"].pulls) == 1 and not hub.collections
        assert hub.files("models/other/tiny") == {"README.md": b"# theirs", "model.safetensors": b"theirs"}
        assert hub.files("models/other/tiny", "refs/pr/1") == read_tree(folder)
        assert "no model zoo/nothing" in input_error(publish(folder, "--repo-id", "zoo/nothing", "--create-pr"))

    def test_private(self, hub, publish, folder):
        assert publish(folder, "--repo-id", REPO, "--private").returncode == 0
        (collection,) = hub.collections.values()
        assert hub.repositories[KEY].private and collection["private"]
        assert publish(folder, "--repo-id", REPO).returncode == 0 and hub.repositories[KEY].private
        assert publish(folder, "--repo-id", "zoo/open").returncode == 0
        assert not hub.repositories["models/zoo/open"].private and collection["private"]
        assert [item["id"] for item in collection["items"]] == [REPO, "zoo/open"]
        assert "is already public" in input_error(publish(folder, "--repo-id", "zoo/open", "--private"))

    @pytest.mark.first_case
    @pytest.mark.parametrize(
        ("license", "words"),
        [(None, "states no licence"), ("other", "unknown"), ("cc-by-nc-nd-4.0", "forbids"), ("unknown", "unknown")],
    )
    def test_publishing_refuses_restrictive_licences(self, hub, publish, folder, license, words):
        card = ModelCard.load(folder / "README.md")
        card.data.license = license
        card.save(folder / "README.md")
        line = input_error(publish(folder, "--repo-id", REPO))
        assert words in line and "--despite-license" in line and not hub.repositories
        assert publish(folder, "--repo-id", REPO, "--private").returncode == 0
        assert publish(folder, "--repo-id", "zoo/open", "--despite-license").returncode == 0

    @pytest.mark.parametrize("license", ["apache-2.0", "mit", "cc-by-nc-sa-4.0", "bsd-3-clause", "cc0-1.0", "gpl-3.0"])
    def test_redistributable_licences(self, license):
        assert re.fullmatch(publishing.REDISTRIBUTABLE, license)

    @pytest.mark.parametrize("license", ["apache-2x0", "cc-by-nd-4.0", "", "llama3", "cc-by-nc-nd-4.0"])
    def test_other_licences(self, license):
        assert not re.fullmatch(publishing.REDISTRIBUTABLE, license)

    @pytest.mark.first_case
    @pytest.mark.parametrize(
        ("token", "words"),
        [
            (OTHER_TOKEN, "your token lacks the permission"),
            (READ_TOKEN, "your token lacks the permission"),
            ("hf_wrong", "log in"),
            ("", "log in"),
        ],
    )
    def test_missing_permissions(self, hub, publish, folder, monkeypatch, token, words):
        monkeypatch.setenv("HF_TOKEN", token)
        assert words in input_error(publish(folder, "--repo-id", REPO)) and not hub.repositories
        hub.add(KEY, {"README.md": "# theirs"})
        assert words in input_error(publish(folder, "--repo-id", REPO)) and len(commits(hub)) == 1

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda f: (f / "config.json").unlink(), "is not a model folder"),
            (lambda f: (f / "config.json").write_text("{"), "is not a model folder"),
            (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
            (lambda f: (f / "README.md").unlink(), "has no model card"),
            (lambda f: (f / "README.md").write_text("---\n: [\n---\n"), "is not a model card"),
            (lambda f: os.truncate(f / "model.safetensors", 99_999), "does not verify"),
            (lambda f: (f / "fingerprint.json").write_text("[]"), "is not a valid fingerprint"),
            (lambda f: (f / "optimizer.pt").write_text("x"), "optimizer.pt is a pickle"),
            (lambda f: (f / "link.txt").symlink_to(ROOT / "LICENSE"), "is a link to a file outside"),
        ],
    )
    def test_invalid_folders(self, hub, publish, folder, spoil, words):
        spoil(folder)
        assert words in input_error(publish(folder, "--repo-id", REPO)) and not writes(hub)

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ([], "name a model folder"),
            (["x", "--repo-id", "zoo/x", "--org", "zoo"], "need --all"),
            (["--all"], "--all takes --org"),
            (["no/such/folder", "--repo-id", "zoo/x"], "there is no model folder"),
            ([SHIPPED_MODEL, "--repo-id", "a b/c"], "is not a repository id"),
            (["--all", "--org", "zoo", "--model", "nothing"], "no checkpoint nothing"),
            ([SHIPPED_MODEL, "--repo-id", "zoo/x", "--create-pr", "--revision", "v2"], "remove --revision"),
            ([SHIPPED_MODEL, "--repo-id", "zoo/x", "--create-pr", "--dry-run"], "no model zoo/x on the Hub"),
            ([SHIPPED_MODEL, "--repo-id", "zoo/x", "--collection", "x" * 61], "has 61 characters"),
        ],
    )
    def test_bad_arguments(self, publish, hub, args, words):
        assert words in input_error(publish(*args)) and not writes(hub)


class TestPublishAll:
    @pytest.fixture
    def catalogue(self, tmp_path, monkeypatch) -> Iterator[Path]:
        """A writable catalogue of four checkpoints; two of them have folders in tmp_path / "mirror"."""
        from res2net_zoo.weights.model_folder import write_converted

        wanted = ("res2net101d.in1k", "res2net152d.in1k", self.PADDLE, self.HOLOCRON)
        first, *entries = re.split(r"^(?=\[\[checkpoints\]\])", catalog.path().read_text(), flags=re.M)
        names = [".".join(re.findall(r'^(?:architecture|tag) = "(.*)"', entry, re.M)) for entry in entries]
        kept = [entry for name, entry in zip(names, entries, strict=True) if name in wanted]
        file = tmp_path / "catalog.toml"
        file.write_text(first + "".join(kept))
        with monkeypatch.context() as patch:
            patch.setattr(catalog, "path", lambda: file)
            catalog.load.cache_clear()
            assert sorted(catalog.load().checkpoints) == sorted(wanted)
            for name in (self.PADDLE, self.HOLOCRON):
                checkpoint = catalog.load().checkpoints[name]
                state = timm.create_model(checkpoint.architecture, num_classes=checkpoint.num_classes).state_dict()
                digest = checkpoint.sha256.ljust(64, "0")
                metadata = {"source": checkpoint.url, "source_sha256": digest, "converter": "1"}
                write_converted(tmp_path / "mirror" / name, checkpoint, state, metadata)
            yield file
        catalog.load.cache_clear()

    PADDLE, HOLOCRON = "res2net50_pd_14w_8s.pd_in1k", "res2net50_26w_4s.holocron_imagenette"

    def test_unpublished_checkpoints_are_published_and_recorded(self, hub, publish, catalogue, tmp_path):
        before = catalogue.read_text()
        args = ["--all", "--org", "zoo-org", "--mirror", tmp_path / "mirror"]
        assert publish(*args, "--dry-run").returncode == 0 and not writes(hub) and catalogue.read_text() == before
        result = publish(*args)
        assert result.returncode == 0, result.stderr
        assert "res2net101d.in1k: skipped, already published as timm/res2net101d.in1k" in result.stdout
        assert "res2net152d.in1k: skipped, no direct download" in result.stdout
        assert f"{self.HOLOCRON}: skipped; the licence" in result.stdout
        assert list(hub.repositories) == [f"models/zoo-org/{self.PADDLE}"]
        digest = sha256_of(tmp_path / "mirror" / self.PADDLE / "model.safetensors")
        (entry,) = [e for e in tomllib.loads(catalogue.read_text())["checkpoints"] if e["hub_id"].startswith("zoo-org")]
        assert (entry["hub_id"], entry["hub_sha256"]) == (f"zoo-org/{self.PADDLE}", digest)
        assert len(set(before.splitlines()) ^ set(catalogue.read_text().splitlines())) == 2
        result = publish(*args, "--despite-license")
        assert result.returncode == 0 and f"models/zoo-org/{self.HOLOCRON}" in hub.repositories
        assert len(hub.commits(f"models/zoo-org/{self.PADDLE}")) == 2
        (collection,) = hub.collections.values()
        assert [item["id"].split("/")[1] for item in collection["items"]] == [self.PADDLE, self.HOLOCRON]

    @pytest.mark.full
    def test_private_repositories_are_not_recorded(self, hub, publish, catalogue, tmp_path):
        before = catalogue.read_text()
        result = publish("--all", "--org", "zoo-org", "--mirror", tmp_path / "mirror", "--private")
        assert result.returncode == 0 and "not recorded" in result.stdout and str(catalogue) not in result.stdout
        assert len(hub.repositories) == 2 and all(r.private for r in hub.repositories.values())
        assert catalogue.read_text() == before

    def test_weights_are_identified_by_their_source(self, hub, publish, catalogue, tmp_path):
        """Independent of the tag in the config and the licence on the card."""
        folder = tmp_path / "mirror" / self.HOLOCRON
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["tag"] = "mine"
        (folder / "config.json").write_text(json.dumps(config))
        bill_of_materials.write(folder)
        checkpoint = catalog.load().checkpoints[self.HOLOCRON]
        assert checkpoint.sha256 or checkpoint.url
        line = input_error(publish(folder, "--repo-id", "zoo/mine"))
        assert f"the licence of {self.HOLOCRON} may not cover" in line and not hub.repositories
        card = (tmp_path / "mirror" / self.PADDLE / "README.md").read_text()
        (tmp_path / "mirror" / self.PADDLE / "README.md").write_text(
            card.replace("license: apache-2.0", "license: mit")
        )
        line = input_error(publish(tmp_path / "mirror" / self.PADDLE, "--repo-id", "zoo/mine"))
        assert "states mit, the release Apache-2.0" in line and not hub.repositories

    @pytest.mark.full
    def test_failure_does_not_stop_other_checkpoints(self, hub, publish, catalogue, tmp_path):
        hub.add(f"models/zoo-org/{self.PADDLE}", {"model.safetensors": b"another"})
        result = publish("--all", "--org", "zoo-org", "--mirror", tmp_path / "mirror", "--despite-license")
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2 and len(errors) == 2 and "different model.safetensors" in errors[0]
        assert f"1 could not be published ({self.PADDLE})" in errors[1]
        assert f"models/zoo-org/{self.HOLOCRON}" in hub.repositories
        recorded = {e["hub_id"] for e in tomllib.loads(catalogue.read_text())["checkpoints"]}
        assert f"zoo-org/{self.HOLOCRON}" in recorded and f"zoo-org/{self.PADDLE}" not in recorded


CALLS = (
    "GET /api/models/zoo/tiny",
    "POST /api/repos/create",
    "POST .*/preupload/",
    "POST .*/objects/batch",
    "PUT /lfs/",
    "POST .*/commit/",
    "GET /api/collections",
    "POST /api/collections$",
    "POST /api/collections/.*/items",
)


class TestFaults:
    @pytest.mark.first_case
    @pytest.mark.parametrize("pattern", CALLS)
    @pytest.mark.parametrize("fault", ["503 twice", "429", "lost answer"])
    def test_publish_retries(self, hub, publish, folder, pattern, fault):
        if fault == "lost answer":
            hub.drop_answer(pattern)
        else:
            hub.fail(pattern, int(fault[:3]), times=2, headers={"Retry-After": "1"})
        result = publish(folder, "--repo-id", REPO)
        assert result.returncode == 0, result.stderr
        assert hub.faults == [] and len(commits(hub)) == 2  # the initial commit of the Hub, and ours
        assert read_tree(folder).items() <= hub.files(KEY).items()
        assert [len(c["items"]) for c in hub.collections.values()] == [1]

    @pytest.mark.first_case
    @pytest.mark.parametrize("fault", ["503 twice", "lost answer"])
    def test_a_pull_request_is_opened_once(self, hub, publish, folder, fault):
        hub.add("models/other/tiny", {"README.md": "# theirs"})
        hub.drop_answer("POST .*/commit/") if fault == "lost answer" else hub.fail("POST .*/commit/", times=2)
        result = publish(folder, "--repo-id", "other/tiny", "--create-pr")
        assert result.returncode == 0 and "/discussions/1" in result.stdout and hub.faults == []
        assert len(hub.repositories["models/other/tiny"].pulls) == 1

    @pytest.mark.full
    def test_interrupted_upload_is_resumed_by_the_next_run(self, hub, publish, folder):
        hub.fail("POST .*/commit/", 503, times=99)
        assert "run it again" in input_error(publish(folder, "--repo-id", REPO))
        assert len(commits(hub)) == 1
        hub.faults.clear()
        hub.requests.clear()
        assert publish(folder, "--repo-id", REPO).returncode == 0 and len(commits(hub)) == 2
        assert not [r for r in hub.requests if r.startswith("PUT")]  # the weights are already uploaded

    def test_unreachable_server(self, publish, folder, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "cannot reach http://127.0.0.1:9" in input_error(publish(folder, "--repo-id", REPO))

    def test_offline(self, publish, folder, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in input_error(publish(folder, "--repo-id", REPO))

    def test_corrupted_downloads_are_not_loaded(self, hub, folder):
        hub.add(KEY, folder)
        size = len(hub.files(KEY)["model.safetensors"])
        for place in (20, size - 100):  # in the header, which safetensors detects, and in a tensor
            hub.corrupt("model.safetensors", at_byte=place)
            with pytest.raises(InputError, match="removed from the cache: run it again"):
                timm.create_model(f"hf-hub:{REPO}", pretrained=True)
            assert hub.faults == [] and not list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
        assert len(list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))) == 1

    def test_weights_are_hashed_once(self, hub, folder, monkeypatch):
        hub.add(KEY, folder)
        seen = []
        monkeypatch.setattr("res2net_zoo.utils.hub_client.sha256_of", lambda path: seen.append(path) or sha256_of(path))
        for _ in range(3):
            timm.create_model(f"hf-hub:{REPO}", pretrained=True)
        assert len(seen) == 1
        blob = seen[0]
        content = bytearray(blob.read_bytes())
        content[-100] ^= 1
        blob.write_bytes(content)  # by another program that writes into the cache
        with pytest.raises(InputError, match="removed from the cache"):
            timm.create_model(f"hf-hub:{REPO}", pretrained=True)

    def test_corrupted_download_without_safetensors(self, hub, folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        hub.add(KEY, folder)
        hub.corrupt("pytorch_model.bin", at_byte=900_000)
        with pytest.raises(InputError, match=r"the download of pytorch_model\.bin"):
            timm.create_model(f"hf-hub:{REPO}", pretrained=True)
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)

    def test_mirror_applies_to_the_catalogue_only(self, hub, folder, monkeypatch, tmp_path):
        """Other repositories and weights with the same name are not affected."""
        monkeypatch.setenv("RES2NET_ZOO_MIRROR", str(tmp_path / "empty"))
        config = json.loads((folder / "config.json").read_text())
        hub.add(KEY, folder)
        config["pretrained_cfg"]["tag"] = "in1k"
        hub.add("models/zoo/tagged", {"config.json": json.dumps(config)})
        hub.commit("models/zoo/tagged", {"model.safetensors": (folder / "model.safetensors").read_bytes()})
        for repo in (REPO, "zoo/tagged"):
            hub.corrupt(f"cdn/models/{repo}", at_byte=900_000)
            with pytest.raises(InputError, match="removed from the cache"):
                timm.create_model(f"hf-hub:{repo}", pretrained=True)
            timm.create_model(f"hf-hub:{repo}", pretrained=True)
        other = timm.create_model("res2net50_26w_4s", num_classes=10)
        torch.save(other.state_dict(), tmp_path / "own.pth")
        own = dict(
            timm.get_pretrained_cfg("res2net50_26w_4s").to_dict(), file=str(tmp_path / "own.pth"), num_classes=10
        )
        loaded = timm.create_model("res2net50_26w_4s", pretrained=True, pretrained_cfg=own, num_classes=10)
        assert torch.equal(loaded.fc.weight, other.fc.weight)

    @pytest.mark.full
    def test_a_full_disk(self, hub, in_process, folder):
        hub.add(KEY, folder)
        with full_disk(500_000):
            assert "cannot store zoo/tiny in the cache" in input_error(in_process("hub/verify.py", REPO))
        assert in_process("hub/verify.py", REPO).returncode == 0

    def test_hash_in_the_catalogue(self, hub, folder, monkeypatch):
        from res2net_zoo.utils.hub_client import check_cached

        hub.add(KEY, folder)
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
        check_cached(REPO, "model.safetensors", sha256=sha256_of(folder / "model.safetensors"))
        with pytest.raises(InputError, match=r"the catalogue records 0+: the file on the Hub has changed"):
            check_cached(REPO, "model.safetensors", sha256="0" * 64)


class TestVerify:
    def test_folder(self, in_process, folder):
        result = in_process("hub/verify.py", folder)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("passed") == 6 and f"{folder}: passed" in result.stdout.splitlines()[-1]

    @pytest.mark.first_case
    @pytest.mark.parametrize("revision", [None, "v1", "sha"])
    def test_repository_at_a_revision(self, hub, in_process, folder, revision):
        first = hub.add(KEY, folder)
        hub.tag(KEY, "v1")
        change_weights(folder)
        last = hub.add(KEY, folder)
        args = ["--revision", first if revision == "sha" else revision] if revision else []
        result = in_process("hub/verify.py", REPO, *args)
        assert result.returncode == 0, result.stderr
        assert (first if revision else last)[:16] in result.stdout and "FAILED" not in result.stdout

    def spoil_weights(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["fc.weight"][0] += 0.05
        save_weights(tensors, folder / "model.safetensors", {})

    @pytest.mark.first_case
    @pytest.mark.parametrize(
        ("change", "failing"),
        [
            (lambda t: t["fc.weight"][0].add_(0.05), {"SHA-256", "bill of materials", "logits"}),
            (lambda t: t.pop("fc.weight"), {"SHA-256", "bill of materials", "strict load"}),
            (lambda t: t.update(more=torch.zeros(1)), {"SHA-256", "bill of materials", "strict load"}),
            (lambda t: t.update({"fc.bias": torch.zeros(11)}), {"SHA-256", "bill of materials", "strict load"}),
            (lambda t: t["fc.bias"][0].fill_(torch.nan), {"SHA-256", "bill of materials", "values", "logits"}),
        ],
    )
    def test_other_weights(self, in_process, folder, change, failing):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_weights(tensors, folder / "model.safetensors", {})
        result = in_process("hub/verify.py", folder)
        failed = {line.split("|")[1].strip() for line in result.stdout.splitlines() if "| FAILED |" in line}
        assert result.returncode == 1 and {name.removesuffix(" of model.safetensors") for name in failed} == failing
        assert f"{len(failing)} of" in result.stdout.splitlines()[-1]

    def test_wrong_wiring_changes_only_the_logits(self, in_process, folder):
        config = json.loads((folder / "config.json").read_text())
        config["model_args"]["block_args"] = {"wiring": "paddle"}
        (folder / "config.json").write_text(json.dumps(config))
        bill_of_materials.write(folder)
        result = in_process("hub/verify.py", folder)
        failed = [line.split("|")[1].strip() for line in result.stdout.splitlines() if "| FAILED |" in line]
        assert result.returncode == 1 and failed == ["logits"]

    def test_weights_saved_by_timm_are_not_identified_as_the_catalogues(self, in_process, tmp_path):
        """timm keeps the tag of the initial weights."""
        trained = timm.create_model("dla60_res2next", drop_rate=0.1)
        trained.pretrained_cfg |= dict(tag="in1k", crop_pct=0.95)
        timm.models.save_for_hf(trained, str(tmp_path), safe_serialization=True)
        result = in_process("hub/verify.py", tmp_path)
        assert result.returncode == 0 and "preprocessing" not in result.stdout

    def test_preprocessing_must_match_the_catalogue(self, in_process, tmp_path):
        from res2net_zoo.weights.model_folder import write_converted

        checkpoint = catalog.load().checkpoints["dla60_res2next.in1k"]
        state = timm.create_model(checkpoint.architecture).state_dict()
        metadata = {"source": "here", "source_sha256": checkpoint.sha256.ljust(64, "0"), "converter": "1"}
        write_converted(tmp_path / "m", checkpoint, state, metadata)
        save_weights(state, tmp_path / "m" / "model.safetensors", metadata | {"source_sha256": "0" * 64})
        fingerprint.write(tmp_path / "m")
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        config["pretrained_cfg"]["crop_pct"] = 0.95
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        bill_of_materials.write(tmp_path / "m")
        result = in_process("hub/verify.py", tmp_path / "m")
        failed = [line for line in result.stdout.splitlines() if "| FAILED |" in line]
        assert len(failed) == 2 and "SHA-256 of the original" in failed[0] and "crop_pct 0.95" in failed[1]

    @pytest.mark.first_case
    @pytest.mark.parametrize(
        "change",
        [
            dict(logits=[10**400]),
            dict(logits=[]),
            dict(logits=[True] * 10),
            dict(sha256={"model.safetensors": 5}),
            dict(sha256={"model.safetensors": "f"}),
            dict(sha256=None),
            dict(input_size=[3, 1000000, 1000000]),
            dict(input_size=[3, -1, 4]),
            dict(input_size=3),
        ],
        ids=str,
    )
    def test_invalid_fingerprint(self, in_process, folder, change):
        content = json.loads((folder / "fingerprint.json").read_text())
        (folder / "fingerprint.json").write_text(json.dumps(content | change))
        assert "is not a valid fingerprint" in input_error(in_process("hub/verify.py", folder))

    @pytest.mark.first_case
    @pytest.mark.parametrize("name", ["fingerprint.json", "config.json"])
    def test_deeply_nested_json(self, in_process, folder, name):
        (folder / name).write_text("[" * 100_000)
        assert name.partition(".")[0] in input_error(in_process("hub/verify.py", folder)) or name == "config.json"

    def test_fingerprint_of_a_zero_classifier(self, in_process, folder):
        tensors = load_file(folder / "model.safetensors")
        save_weights({k: t * (not k.startswith("fc.")) for k, t in tensors.items()}, folder / "model.safetensors", {})
        fingerprint.write(folder)
        bill_of_materials.write(folder)
        assert in_process("hub/verify.py", folder).returncode == 0

    def test_missing_fingerprint_is_reported(self, in_process, folder):
        (folder / "fingerprint.json").unlink()
        result = in_process("hub/verify.py", folder)
        assert (
            result.returncode == 0 and "the expected hash of its weights is unknown" in result.stdout.splitlines()[-1]
        )

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("zoo/nothing", "no model zoo/nothing on the Hub"),
            ("no/such/folder", "there is no model folder"),
            ("a b/c", "there is no model folder a b/c"),
            ("tests", "is not a model folder"),
        ],
    )
    def test_bad_input(self, hub, in_process, target, words):
        assert words in input_error(in_process("hub/verify.py", target))

    def test_missing_revision(self, hub, in_process, folder):
        hub.add(KEY, folder)
        assert "revision not found" in input_error(in_process("hub/verify.py", REPO, "--revision", "v9"))

    @pytest.mark.first_case
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_corrupted_download(self, hub, in_process, folder, name):
        hub.add(KEY, folder)
        hub.corrupt(f"GET .*{name}", at_byte=400)
        line = input_error(in_process("hub/verify.py", REPO))
        assert name in line and "removed from the cache" in line and hub.faults == []
        assert in_process("hub/verify.py", REPO).returncode == 0

    def test_private(self, hub, in_process, folder, monkeypatch):
        hub.add(KEY, folder, private=True)
        assert in_process("hub/verify.py", REPO).returncode == 0
        for token in ("", OTHER_TOKEN):
            monkeypatch.setenv("HF_TOKEN", token)
            assert "is private and you are not logged in" in input_error(in_process("hub/verify.py", REPO))

    def test_message_for_a_busy_hub(self, hub, in_process, folder):
        hub.add(KEY, folder)
        hub.fail("GET /api/models/zoo/tiny", times=2)
        assert in_process("hub/verify.py", REPO).returncode == 0
        hub.fail("GET /api/models/zoo/tiny", 429, times=99)
        assert "too many requests" in input_error(in_process("hub/verify.py", REPO))


class TestCards:
    @pytest.mark.first_case
    @pytest.mark.parametrize("name", list(catalog.load().checkpoints))
    def test_every_checkpoints_card(self, name):
        from res2net_zoo.weights.card import checkpoint_card, eval_results, in_timm

        checkpoint = catalog.load().checkpoints[name]
        metadata = {"source": checkpoint.url or "a file", "source_sha256": "12" * 32, "converter": "1"}
        card = checkpoint_card(checkpoint, metadata)
        data = card.data.to_dict()
        assert data["license"] == checkpoint.license.lower() and checkpoint.license in card.text
        assert checkpoint.license_note in card.text and metadata["source_sha256"] in card.text
        task = "image-classification" if checkpoint.num_classes else "image-feature-extraction"
        assert (data["library_name"], data["pipeline_tag"]) == ("timm", task)
        trained_on = ["frgfm/imagenette" if "imagenette" in name else "imagenet-1k"]
        assert data["datasets"] == trained_on + ["detection-datasets/coco"] * len(checkpoint.downstream)
        wiring = "paddle" if "_vd_" in name or "_pd_" in name else "official"
        assert f"(`{'mmdet' if '_v1d' in name else wiring}`)" in card.text and "three wirings" in card.text
        for result in checkpoint.downstream:
            assert result.model in card.text and result.text in card.text and result.source in card.text
        assert data.get("base_model") == (checkpoint.base_model or None)
        figures = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results or []}
        for accuracy in reversed(checkpoint.accuracies):
            assert f"{accuracy.top1:.3f}" in card.text and accuracy.source in card.text
        for dataset in {accuracy.dataset for accuracy in checkpoint.accuracies}:
            first = next(a for a in checkpoint.accuracies if a.dataset == dataset)
            assert figures[dataset, "accuracy"] == first.top1 and figures[dataset, "top-5-accuracy"] == first.top5
        # Code blocks of the card are not escaped.
        for block in re.findall(r"```python\n(.*?)```", card.text, re.S):
            compile(block, name, "exec")
        assert "import res2net_zoo" in card.text and f'timm.create_model("{name}", pretrained=True' in card.text
        assert ("does not include this model" in card.text) == (not in_timm(checkpoint.architecture))
        files = eval_results(checkpoint)
        imagenet = [a for a in checkpoint.accuracies if a.dataset in ("imagenet-1k", "imagenette2")]
        assert len(files) == bool(imagenet)
        for entries in files.values():
            (entry,) = entries
            assert entry.value == imagenet[0].top1 and entry.source_name == imagenet[0].source and entry.source_url

    @pytest.mark.full
    def test_names_of_timm(self):
        from res2net_zoo.weights.card import in_timm

        code = "import timm; print(*timm.list_models('*res2ne*'))"
        timms = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert len(timms) == 11 and {name for name in catalog.load().architectures if in_timm(name)} == set(timms)

    def test_code_in_cards_runs(self, tmp_path, monkeypatch, hub):
        """Runs all code blocks but that of transformers (test_transformers.py), with a mirror of random weights."""
        from PIL import Image

        from res2net_zoo.weights.card import checkpoint_card

        checkpoint = catalog.load().checkpoints["dla60_res2next.in1k"]
        (tmp_path / checkpoint.name).mkdir()
        state = timm.create_model(checkpoint.architecture).state_dict()
        save_weights(state, tmp_path / checkpoint.name / "model.safetensors", {})
        monkeypatch.setenv("RES2NET_ZOO_MIRROR", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (300, 200), (200, 30, 90)).save("image.jpg")
        text = checkpoint_card(checkpoint, {"source": "a", "source_sha256": "b", "converter": "1"}).text
        scope: dict = {}
        blocks = re.findall(r"```python\n(.*?)```", text, re.S)
        others = [code for code in blocks if "from transformers import" not in code]
        assert len(others) == len(blocks) - 1 == 3
        exec("\n".join(others), scope)
        assert scope["top5"].indices.shape == (1, 5) and len(scope["features"]) == 5
        shape = re.search(r"embedding = .*# \((\d+), (\d+)\)", text)
        assert shape and scope["embedding"].shape == tuple(map(int, shape.groups()))


class TestMirror:
    """`hub/mirror.py` with a repository on the Hub; for a release's URL, see test_from_release_to_hub_and_back."""

    @pytest.fixture
    def entry(self, hub, monkeypatch, tmp_path) -> str:
        """A checkpoint of the catalogue on the Hub, as in timm's repositories: without a fingerprint, with a pickle."""
        from res2net_zoo.weights.model_folder import write_converted

        checkpoint = catalog.load().checkpoints["dla60_res2next.in1k"]
        state = timm.create_model(checkpoint.architecture).state_dict()
        made = tmp_path / "made"
        metadata = {"source": "here", "source_sha256": checkpoint.sha256 + "0" * 56, "converter": "1"}
        write_converted(made, checkpoint, state, metadata)
        (made / "fingerprint.json").unlink()
        (made / "pytorch_model.bin").write_bytes(b"never fetched")
        hub.add(f"models/{checkpoint.hub_id}", made)
        return checkpoint.name

    def test_mirror_from_the_hub_is_used_offline(self, hub, in_process, entry, tmp_path, monkeypatch):
        root = tmp_path / "mirror"
        result = in_process("hub/mirror.py", "--to", root, "--model", entry)
        assert result.returncode == 0, result.stderr
        there = hub.files(f"models/timm/{entry}")
        mine = read_tree(root / entry)
        assert mine.pop("fingerprint.json") and mine == {k: v for k, v in there.items() if not k.endswith(".bin")}
        assert not (root / ".partial").exists() and f"timm/{entry}" in result.stdout
        senders = dict(zip(hub.requests, hub.senders, strict=True))
        assert {sender for request, sender in senders.items() if "/cdn/" in request} == {None}
        hub.requests.clear()
        assert "already present" in in_process("hub/mirror.py", "--to", root, "--model", entry).stdout
        assert hub.requests == []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("RES2NET_ZOO_MIRROR", str(root))
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            a = timm.create_model(entry, pretrained=True).eval()(x)
            b = timm.create_model(f"local-dir:{root / entry}", pretrained=True).eval()(x)
        assert torch.equal(a, b) and hub.requests == []
        assert in_process("hub/verify.py", root / entry).returncode == 0

    @pytest.mark.full
    def test_interrupted_download_is_resumed(self, hub, in_process, entry, tmp_path):
        root = tmp_path / "mirror"
        hub.cut("GET /cdn/", at_byte=50_000_000, reset=True)
        hub.cut("GET /cdn/", at_byte=100_000, reset=True, times=3)
        line = input_error(in_process("hub/mirror.py", "--to", root, "--model", entry))
        assert "run it again" in line and hub.faults == [] and not (root / entry).exists()
        (part,) = root.rglob("model.safetensors.*.part")
        assert part.stat().st_size > 40_000_000
        hub.requests.clear()
        hub.cut("GET /cdn/", at_byte=40_000_000, reset=True)  # only reached if everything is sent again
        assert in_process("hub/mirror.py", "--to", root, "--model", entry).returncode == 0
        assert hub.faults and len([r for r in hub.requests if "/cdn/" in r]) == 1
        content = (root / entry / "model.safetensors").read_bytes()
        assert content == hub.files(f"models/timm/{entry}")["model.safetensors"]
        assert not list(root.rglob("*.part"))

    @pytest.mark.full
    def test_corrupted_file(self, hub, in_process, entry, tmp_path):
        hub.corrupt("GET /cdn/", at_byte=9_000_000)
        line = input_error(in_process("hub/mirror.py", "--to", tmp_path / "mirror", "--model", entry))
        assert "model.safetensors of timm/dla60_res2next.in1k has the hash" in line
        assert not list((tmp_path / "mirror").rglob("model.safetensors*"))
        assert in_process("hub/mirror.py", "--to", tmp_path / "mirror", "--model", entry).returncode == 0

    @pytest.mark.full
    def test_a_full_disk(self, hub, in_process, entry, tmp_path):
        root = tmp_path / "mirror"
        with full_disk(30_000_000):
            line = input_error(in_process("hub/mirror.py", "--to", root, "--model", entry))
        assert "cannot write" in line and "free some space" in line and not (root / entry).exists()
        assert in_process("hub/mirror.py", "--to", root, "--model", entry).returncode == 0

    @pytest.mark.full
    def test_damaged_mirror_is_reported(self, hub, in_process, entry, tmp_path):
        root = tmp_path / "mirror"
        in_process("hub/mirror.py", "--to", root, "--model", entry)
        os.truncate(root / entry / "model.safetensors", 1000)
        line = input_error(in_process("hub/mirror.py", "--to", root, "--model", entry))
        assert "is damaged (SHA-256 of model.safetensors" in line

    def test_repository_with_another_checkpoint(self, hub, in_process, entry, tmp_path):
        from res2net_zoo.weights.model_folder import write_converted

        checkpoint = catalog.load().checkpoints[entry]
        state = timm.create_model(checkpoint.architecture).state_dict()
        metadata = {"source": "elsewhere", "source_sha256": checkpoint.sha256.ljust(64, "0"), "converter": "1"}
        write_converted(tmp_path / "wrong", checkpoint, state, metadata)
        save_weights(state, tmp_path / "wrong" / "model.safetensors", metadata | {"source_sha256": "f" * 64})
        fingerprint.write(tmp_path / "wrong")
        bill_of_materials.write(tmp_path / "wrong")
        hub.add(f"models/{checkpoint.hub_id}", tmp_path / "wrong")
        line = input_error(in_process("hub/mirror.py", "--to", tmp_path / "mirror", "--model", entry))
        assert (
            "is not dla60_res2next.in1k: SHA-256 of the original" in line and not (tmp_path / "mirror" / entry).exists()
        )

    @pytest.mark.first_case
    @pytest.mark.parametrize("config", [None, "{", '{"architecture": "resnet18"}', "tiny"])
    def test_repository_with_another_model(self, hub, in_process, entry, tmp_path, config):
        key = f"models/timm/{entry}"
        if config == "tiny":
            hub.commit(key, read_tree(SHIPPED_MODEL))
        else:
            hub.commit(key, {"config.json": config} if config else {}, () if config else ["config.json"])
        args = ["--to", tmp_path / "mirror", "--model", entry]
        line = input_error(in_process("hub/mirror.py", *args))
        assert f"is no {entry}" in line or f"is not {entry}" in line
        assert not (tmp_path / "mirror" / entry).exists()
        # After the repository is corrected, nothing of the earlier download is used.
        before = hub.files(key, hub.commits(key)[1].sha)
        hub.commit(key, before, hub.files(key).keys() - before.keys())
        assert in_process("hub/mirror.py", *args).returncode == 0
        mine = {name for name in read_tree(tmp_path / "mirror" / entry) if name != "fingerprint.json"}
        assert mine <= hub.files(key).keys()

    @pytest.mark.full
    def test_unavailable_checkpoints_do_not_stop_others(self, hub, in_process, entry, tmp_path):
        root = tmp_path / "mirror"
        args = ["--to", root, "--model", "res2net101_26w_4s.in1k", entry, "res2net152d.in1k"]
        result = in_process("hub/mirror.py", *args)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.returncode == 2 and len(errors) == 3 and "Traceback" not in result.stderr
        assert "there is no model timm/res2net101_26w_4s.in1k" in errors[0]
        assert f"convert a local copy into {root / 'res2net152d.in1k'} with `res2net-zoo convert`" in errors[1]
        assert "2 of 3 are missing" in errors[2] and (root / entry / "config.json").is_file()

    @pytest.mark.full
    def test_concurrent_mirrors(self, hub, in_process, entry, tmp_path):
        from huggingface_hub.utils import WeakFileLock

        root = tmp_path / "mirror"
        root.mkdir()
        with WeakFileLock(root / ".lock"):
            assert "another program is writing" in input_error(
                in_process("hub/mirror.py", "--to", root, "--model", entry)
            )

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--to", "README.md"], "README.md is a file"),
            (["--to", "/proc/nothing/mirror"], "cannot write into /proc"),
            (["--to", "x", "--model", "resnet50"], "no checkpoint resnet50"),
            ([], "--to"),
        ],
    )
    def test_bad_input(self, hub, in_process, args, words):
        assert words in input_error(in_process("hub/mirror.py", *args)) and not Path("x").exists()


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the programs and the package, with a writable catalogue."""
    shutil.copytree(ROOT / "res2net_zoo", tmp_path / "clone" / "res2net_zoo")
    shutil.copytree(ROOT / "hub", tmp_path / "clone" / "hub")
    shutil.copy(ROOT / "res2net_zoo_cli.py", tmp_path / "clone")
    return tmp_path / "clone"


@pytest.mark.full
def test_from_release_to_hub_and_back(original, model, clone, tmp_path):  # noqa: F811
    """From a release to the Hub and back in every way, each step in a separate process."""
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    torch.save(x, tmp_path / "x.pt")
    load = (
        "import sys, timm, torch, res2net_zoo; name, x, out = sys.argv[1:]\n"
        "torch.set_num_threads(2)\n"  # as in this process, because the last bits may depend on it
        "with torch.no_grad():\n"
        "    torch.save(timm.create_model(name, pretrained=True).eval()(torch.load(x)), out)\n"
    )
    with serve({"models/files/originals": {"original.pdparams": original.read_bytes()}}) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        env |= {"PYTHONPATH": str(clone), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

        def run(*command: object, **more: str) -> str:
            result = subprocess.run(
                [*map(str, command)], cwd=clone, env=env | more, capture_output=True, text=True, timeout=200
            )
            assert result.returncode == 0, (command, result.stdout, result.stderr)
            assert TOKEN not in result.stdout + result.stderr
            return result.stdout

        def logits(name: str, **more: str) -> torch.Tensor:
            run(sys.executable, "-c", load, name, tmp_path / "x.pt", tmp_path / "logits.pt", **more)
            return torch.load(tmp_path / "logits.pt")

        url = f"{hub.endpoint}/files/originals/resolve/main/original.pdparams"
        made = tmp_path / "made"
        run(sys.executable, "hub/convert.py", "--model", NAME, "--checkpoint", url, "--output", made / NAME)
        before = (clone / "res2net_zoo" / "catalog.toml").read_text()
        args = ["--all", "--org", "zoo-org", "--model", NAME, "--mirror", made]
        assert "published: " in run(sys.executable, "hub/publish.py", *args)
        # Only repository and hash were added to the catalogue.
        after = (clone / "res2net_zoo" / "catalog.toml").read_text().splitlines()
        changed = [(a, b) for a, b in zip(before.splitlines(), after, strict=True) if a != b]
        digest = sha256_of(made / NAME / "model.safetensors")
        assert changed == [
            ('hub_id = ""', f'hub_id = "zoo-org/{NAME}"'),
            ('hub_sha256 = ""', f'hub_sha256 = "{digest}"'),
        ]
        assert torch.equal(logits(NAME), expected)
        hf = shutil.which("hf") or str(Path(sys.executable).with_name("hf"))
        run(hf, "download", f"zoo-org/{NAME}", "--local-dir", tmp_path / "down" / NAME)
        alone = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "empty")}
        assert torch.equal(logits(f"local-dir:{tmp_path / 'down' / NAME}", **alone), expected)
        assert torch.equal(logits(NAME, RES2NET_ZOO_MIRROR=str(tmp_path / "down"), **alone), expected)
        assert "FAILED" not in run(sys.executable, "hub/verify.py", f"zoo-org/{NAME}")
        run(sys.executable, "hub/mirror.py", "--to", tmp_path / "mirror", "--model", NAME)
        assert torch.equal(logits(NAME, RES2NET_ZOO_MIRROR=str(tmp_path / "mirror"), **alone), expected)
        with (tmp_path / "down" / NAME / "README.md").open("a") as file:
            file.write("\nMore.\n")
        args = [tmp_path / "down" / NAME, "--repo-id", f"zoo-org/{NAME}", "--create-pr"]
        assert "/discussions/1" in run(sys.executable, "hub/publish.py", *args)
        assert len(hub.repositories[f"models/zoo-org/{NAME}"].pulls) == 1
        assert hub.files(f"models/zoo-org/{NAME}", "refs/pr/1")["README.md"].endswith(b"More.\n")
        (collection,) = hub.collections.values()
        assert [item["id"] for item in collection["items"]] == [f"zoo-org/{NAME}"]
        import yaml

        results = yaml.safe_load(hub.files(f"models/zoo-org/{NAME}")[".eval_results/imagenet-1k.yaml"])
        (entry,) = parse_eval_result_entries(results)
        assert (entry.dataset_id, entry.value) == ("ILSVRC/imagenet-1k", 83.1)


class TestSpace:
    """`publish --space` sends the page of `res2net-zoo space`, with the same code as for models."""

    KEY = "spaces/zoo-org/page"

    def test_one_commit_and_idempotent(self, hub, publish):
        result = publish("--space", "zoo-org/page", "--private")
        assert result.returncode == 0, result.stderr
        assert hub.repositories[self.KEY].private and len(hub.commits(self.KEY)) == 2  # with the initial one
        sent = hub.files(self.KEY)
        del sent[".gitattributes"]
        assert sent == read_tree(ROOT / "hub" / "space")
        assert sent["README.md"].startswith(b"---\n") and b"\nsdk: gradio\n" in sent["README.md"]
        (collection,) = hub.collections.values()
        assert [(item["type"], item["id"]) for item in collection["items"]] == [("space", "zoo-org/page")]
        assert "zoo-org/page is up to date" in publish("--space", "zoo-org/page").stdout
        assert len(hub.commits(self.KEY)) == 2 and not hub.errors

    def test_dry_run_sends_nothing(self, hub, publish):
        result = publish("--space", "zoo-org/page", "--dry-run")
        assert result.returncode == 0 and not hub.repositories, result.stderr
        assert "files to the new public zoo-org/page in one commit to main" in result.stdout
        assert all(request.startswith(("GET", "HEAD")) for request in hub.requests)

    def test_invalid_options_are_refused(self, hub, publish):
        assert "--space takes no DIR" in input_error(publish("folder", "--space", "zoo-org/page"))
        assert "no Space zoo-org/page" in input_error(publish("--space", "zoo-org/page", "--create-pr"))
        publish("--space", "zoo-org/page")
        assert "already public" in input_error(publish("--space", "zoo-org/page", "--private"))
