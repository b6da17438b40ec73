"""The test Hub with the real client and `hf`, and the behaviour of that client under faults."""

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub import constants as hf_constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN, Hub, hasten, serve

HTTPError = HfHubHTTPError.__mro__[1]  # of httpx2: also raised for broken connections
KEY, NAME = "models/zoo/net", "zoo/net"
WEIGHTS = random.Random(0).randbytes(300_000)
FILES = {"README.md": b"# net", "config.json": b"{}", "sub/model.safetensors": WEIGHTS}
LARGE = "sub/model.safetensors"


@pytest.fixture(autouse=True)
def online_without_xet(monkeypatch):
    """Set HF_HUB_OFFLINE and HF_HUB_DISABLE_XET, which the client reads on import."""
    monkeypatch.setattr(hf_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def quick(monkeypatch):
    """Disable waits between retries, for tests that count them."""
    hasten(monkeypatch)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve({KEY: FILES}) as hub:
        yield hub


def api(hub: Hub, token: str | bool = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def commit(hub: Hub, files: dict[str, bytes], token: str | bool = TOKEN, **more):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api(hub, token).create_commit(NAME, operations, commit_message="change", **more)


def asked(hub: Hub, text: str) -> list[str]:
    return [request for request in hub.requests if text in request]


def tree(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def run_hf(hub: Hub, home: Path, *args: object, token: str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_TOKEN": token} if token else {}
    program = shutil.which("hf") or str(Path(sys.executable).with_name("hf"))
    return subprocess.run([program, *map(str, args)], env=env, capture_output=True, text=True, timeout=120)


class TestReading:
    def test_snapshot(self, hub, tmp_path):
        folder = Path(snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path, token=TOKEN))
        assert tree(folder) == FILES and folder.name == hub.sha(KEY)
        blobs = {path.name for path in (tmp_path / "models--zoo--net" / "blobs").iterdir()}
        described = {entry.path: entry for entry in api(hub).list_repo_tree(NAME, recursive=True)}
        assert (folder / LARGE).resolve().name == described[LARGE].lfs.sha256
        assert (folder / "README.md").resolve().name == described["README.md"].blob_id
        assert len(blobs) == 3
        git = subprocess.run(["git", "hash-object", folder / "README.md"], capture_output=True, text=True)
        assert git.stdout.strip() == described["README.md"].blob_id
        # The token is not sent to the other origin of LFS content.
        senders = dict(zip(hub.requests, hub.senders, strict=True))
        assert [sender for request, sender in senders.items() if "/cdn/" in request] == [None]
        assert {sender for request, sender in senders.items() if "/cdn/" not in request} == {"zoo"}
        hub.requests.clear()
        snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path, revision=hub.sha(KEY))
        assert hub.requests == []

    def test_descriptions(self, hub):
        info = api(hub).model_info(NAME, files_metadata=True)
        assert (info.sha, info.private) == (hub.sha(KEY), False)
        assert {s.rfilename: s.size for s in info.siblings} == {path: len(content) for path, content in FILES.items()}
        assert [s.rfilename for s in info.siblings if s.lfs] == [LARGE]
        entries = {entry.path: entry for entry in api(hub).list_repo_tree(NAME, expand=True)}
        assert list(entries) == ["README.md", "config.json", "sub"] and entries["README.md"].last_commit.title
        assert [entry.path for entry in api(hub).list_repo_tree(NAME, "sub")] == [LARGE]
        assert [file.size for file in api(hub).get_paths_info(NAME, [LARGE, "nothing"])] == [len(WEIGHTS)]
        with pytest.raises(RemoteEntryNotFoundError):
            list(api(hub).list_repo_tree(NAME, "nothing"))

    def test_pages(self, hub):
        hub.page_size = 2
        hub.commit(KEY, {f"many/{number}": b"x" for number in range(5)})
        assert api(hub).list_repo_files(NAME) == sorted(hub.files(KEY))
        assert len(asked(hub, "/tree/")) == 5  # 8 files and 2 folders

    def test_missing_files_and_repositories(self, hub, tmp_path):
        for token in (TOKEN, False):
            with pytest.raises(RepositoryNotFoundError) as caught:
                api(hub, token).model_info("zoo/nothing")
            assert caught.value.response.status_code == (404 if token else 401)
        with pytest.raises(RevisionNotFoundError):
            api(hub).model_info(NAME, revision="nothing")
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download(NAME, "nothing", endpoint=hub.endpoint, cache_dir=tmp_path)

    def test_private(self, hub, tmp_path):
        hub.add("models/zoo/secret", FILES, private=True)
        for token in (False, OTHER_TOKEN):
            with pytest.raises(RepositoryNotFoundError):
                snapshot_download("zoo/secret", endpoint=hub.endpoint, cache_dir=tmp_path, token=token)
        with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
            api(hub, "hf_wrong").model_info("zoo/secret")
        assert type(caught.value) is HfHubHTTPError
        folder = snapshot_download("zoo/secret", endpoint=hub.endpoint, cache_dir=tmp_path, token=READ_TOKEN)
        assert tree(folder) == FILES and api(hub).model_info("zoo/secret").private

    def test_verify(self, hub, tmp_path):
        folder = snapshot_download(NAME, endpoint=hub.endpoint, local_dir=tmp_path / "local")
        assert api(hub).verify_repo_checksums(NAME, local_dir=folder).mismatches == []
        for name in ("README.md", LARGE):
            (Path(folder) / name).write_bytes(b"changed")
        (Path(folder) / "config.json").rename(Path(folder) / "other")
        found = api(hub).verify_repo_checksums(NAME, local_dir=folder)
        assert [entry["algorithm"] for entry in found.mismatches] == ["git-sha1", "sha256"]
        assert (found.missing_paths, found.extra_paths, found.checked_count) == (["config.json"], ["other"], 2)

    def test_dataset(self, hub, tmp_path):
        hub.add("datasets/zoo/data", {"validation/0/a.jpg": b"\xff\0", "table.parquet": WEIGHTS})
        folder = snapshot_download("zoo/data", repo_type="dataset", endpoint=hub.endpoint, cache_dir=tmp_path)
        assert tree(folder) == hub.files("datasets/zoo/data")


class TestWriting:
    def test_create(self, hub):
        assert api(hub).create_repo("zoo/new", private=True).repo_id == "zoo/new"
        assert hub.repositories["models/zoo/new"].private and list(hub.files("models/zoo/new")) == [".gitattributes"]
        assert api(hub).create_repo("zoo/new", exist_ok=True).repo_id == "zoo/new"
        api(hub).create_repo("zoo/new", repo_type="dataset")
        for token, status in ((TOKEN, 409), (OTHER_TOKEN, 403), (READ_TOKEN, 403), (False, 401)):
            with pytest.raises(HfHubHTTPError) as caught:
                api(hub, token).create_repo("zoo/new")
            assert caught.value.response.status_code == status

    def test_one_commit_of_both_kinds(self, hub, tmp_path):
        before = hub.sha(KEY)
        done = commit(hub, {"README.md": b"new", "new.safetensors": b"weights"}, commit_description="why")
        assert hub.files(KEY) == {**FILES, "README.md": b"new", "new.safetensors": b"weights"}
        first, second = hub.commits(KEY)
        assert (first.sha, first.parent, second.sha) == (done.oid, before, before) and done.pr_url is None
        assert (first.title, first.description, first.author) == ("change", "why", "zoo")
        assert len(asked(hub, "PUT")) == 1 and hub.files(KEY, before) == FILES
        listed = api(hub).list_repo_commits(NAME)
        assert [(c.commit_id, c.title) for c in listed] == [(done.oid, "change"), (before, "Upload")]
        # The same content creates no commit, and nothing is sent.
        hub.requests.clear()
        assert commit(hub, {"README.md": b"new", "new.safetensors": b"weights"}).oid == done.oid
        assert not asked(hub, "PUT") and not asked(hub, "/commit/")
        # Content that exists under another name is not sent again.
        commit(hub, {"copy.safetensors": b"weights"})
        assert not asked(hub, "PUT") and hub.files(KEY)["copy.safetensors"] == b"weights"

    def test_delete(self, hub):
        operations = [CommitOperationDelete("config.json"), CommitOperationDelete("sub/")]
        api(hub).create_commit(NAME, operations, commit_message="less")
        assert list(hub.files(KEY)) == ["README.md"]
        with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
            api(hub).create_commit(NAME, operations, commit_message="less")

    def test_parent(self, hub):
        parent = hub.sha(KEY)
        hub.before("POST .*/commit/", lambda: hub.commit(KEY, {"theirs": b"1"}))
        with pytest.raises(HfHubHTTPError) as caught:
            commit(hub, {"ours": b"2"}, parent_commit=parent)
        assert caught.value.response.status_code == 412 and "ours" not in hub.files(KEY)
        commit(hub, {"ours": b"2"}, parent_commit=hub.sha(KEY)[:7])
        assert {"ours", "theirs"} <= hub.files(KEY).keys()

    def test_pull_request(self, hub):
        done = commit(hub, {"README.md": b"better", "w.bin": b"1"}, token=OTHER_TOKEN, create_pr=True)
        assert (done.pr_revision, done.pr_num) == ("refs/pr/1", 1)
        assert hub.files(KEY) == FILES and hub.files(KEY, "refs/pr/1")["README.md"] == b"better"
        assert commit(hub, {"more": b"1"}, token=OTHER_TOKEN, revision="refs/pr/1").oid == hub.sha(KEY, "refs/pr/1")
        (pull,) = api(hub).get_repo_discussions(NAME, discussion_type="pull_request", discussion_status="open")
        assert (pull.title, pull.git_reference, pull.author) == ("change", "refs/pr/1", "other")
        refs = api(hub).list_repo_refs(NAME, include_pull_requests=True)
        assert [ref.target_commit for ref in refs.pull_requests] == [hub.sha(KEY, "refs/pr/1")]
        assert "more" in api(hub).list_repo_files(NAME, revision="refs/pr/1")
        assert api(hub, OTHER_TOKEN).create_pull_request(NAME, title="draft").git_reference == "refs/pr/2"
        with pytest.raises(HfHubHTTPError, match="403"):
            commit(hub, {"README.md": b"better"}, token=OTHER_TOKEN)

    def test_branches_and_tags(self, hub):
        with pytest.raises(RevisionNotFoundError):
            commit(hub, {"x": b"1"}, revision="dev")
        api(hub).create_branch(NAME, branch="dev/one")
        api(hub).create_branch(NAME, branch="dev/one", exist_ok=True)
        commit(hub, {"x": b"1"}, revision="dev/one")
        api(hub).create_tag(NAME, tag="v1", revision="dev/one")
        assert "x" in hub.files(KEY, "v1") and "x" not in hub.files(KEY)
        refs = api(hub).list_repo_refs(NAME)
        assert [ref.name for ref in refs.branches] == ["main", "dev/one"] and refs.tags[0].name == "v1"

    def test_card(self, hub):
        with pytest.raises(ValueError, match="Invalid metadata"):
            commit(hub, {"README.md": b"---\nlicense: mit\n"})
        commit(hub, {"README.md": b"---\nlicense: mit\n---\n# net\n"})

    def test_concurrent_requests(self, hub):
        threads = [threading.Thread(target=commit, args=(hub, {f"{i}.bin": WEIGHTS[i:]})) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {path for path in hub.files(KEY) if path.endswith(".bin")} == {f"{i}.bin" for i in range(6)}
        assert len(hub.commits(KEY)) == 7

    def test_collections(self, hub):
        made = api(hub).create_collection("The Zoo", namespace="zoo-org", description="all of it")
        assert made.slug.startswith("zoo-org/the-zoo-") and made.url.startswith(hub.endpoint)
        assert api(hub).create_collection("The Zoo", namespace="zoo-org", exists_ok=True).slug == made.slug
        for number in range(5):
            hub.add(f"models/zoo/{number}", {})
            api(hub).add_collection_item(made.slug, f"zoo/{number}", "model", note=f"number {number}")
        again = api(hub).add_collection_item(made.slug, "zoo/0", "model", exists_ok=True)
        assert [item.item_id for item in again.items] == [f"zoo/{number}" for number in range(5)]
        with pytest.raises(HfHubHTTPError, match="409"):
            api(hub).add_collection_item(made.slug, "zoo/0", "model")
        with pytest.raises(RepositoryNotFoundError):
            api(hub).add_collection_item(made.slug, "zoo/nothing", "model")
        with pytest.raises(HfHubHTTPError, match="403"):
            api(hub, OTHER_TOKEN).add_collection_item(made.slug, NAME, "model")
        api(hub).update_collection_item(made.slug, again.items[0].item_object_id, note="first")
        api(hub).delete_collection_item(made.slug, again.items[1].item_object_id)
        api(hub).update_collection_metadata(made.slug, description="less of it")
        found = api(hub).get_collection(made.slug)
        assert [item.note for item in found.items] == ["first", "number 2", "number 3", "number 4"]
        api(hub).add_collection_item(made.slug, NAME, "model")
        # A list shows four items of a collection at most.
        assert [len(c.items) for c in api(hub).list_collections(owner="zoo-org")] == [4]
        assert found.description == "less of it" and list(api(hub).list_collections(owner="zoo")) == []


class TestCommand:
    def test_download(self, hub, tmp_path):
        result = run_hf(hub, tmp_path / "hf", "download", NAME, "--local-dir", tmp_path / "out")
        assert result.returncode == 0, result.stderr
        assert tree(tmp_path / "out") == FILES
        hub.add("models/zoo/secret", FILES, private=True)
        refused = run_hf(hub, tmp_path / "hf", "download", "zoo/secret")
        assert refused.returncode == 1 and "zoo/secret" in refused.stderr and "Traceback" not in refused.stderr
        assert run_hf(hub, tmp_path / "hf", "download", "zoo/secret", token=TOKEN).returncode == 0

    def test_upload(self, hub, tmp_path):
        (tmp_path / "up" / "sub").mkdir(parents=True)
        for name, content in FILES.items():
            (tmp_path / "up" / name).write_bytes(content)
        for args in ([], ["--revision", "dev"], ["--create-pr"]):
            (tmp_path / "up" / "config.json").write_text(str(args))
            result = run_hf(hub, tmp_path / "hf", "upload", "zoo/up", tmp_path / "up", *args, token=TOKEN)
            assert result.returncode == 0, result.stderr
        states = [hub.files("models/zoo/up", revision) for revision in ("main", "dev", "refs/pr/1")]
        assert [state["config.json"] for state in states] == [b"[]", b"['--revision', 'dev']", b"['--create-pr']"]
        assert all(state[LARGE] == WEIGHTS and ".gitattributes" in state for state in states)
        assert len(asked(hub, "PUT")) == 1
        refused = run_hf(hub, tmp_path / "hf", "upload", "zoo/up", tmp_path / "up")
        assert refused.returncode == 1

    def test_whoami(self, hub, tmp_path):
        assert "zoo-org" in run_hf(hub, tmp_path, "auth", "whoami", token=TOKEN).stdout
        assert run_hf(hub, tmp_path, "auth", "whoami", token="hf_wrong").returncode == 1


class TestFaults:
    """Which faults the client retries, and which it raises."""

    def download(self, hub: Hub, cache: Path, name: str = LARGE, **more) -> bytes:
        return Path(hf_hub_download(NAME, name, endpoint=hub.endpoint, cache_dir=cache, **more)).read_bytes()

    @pytest.mark.parametrize("what", ["/preupload/", "/objects/batch", "PUT ", "/verify$", "/tree/", "/commits/"])
    def test_retried_requests(self, hub, quick, what):
        for fault in (hub.fail, hub.drop_answer):
            fault(what, times=2)
            hub.fail(what, 429, headers={"Retry-After": "0"})
            hub.requests.clear()
            commit(hub, {"w.bin": what.encode() + str(fault).encode()})
            assert api(hub).list_repo_files(NAME) == list(hub.files(KEY))
            api(hub).list_repo_commits(NAME)
            assert len(asked(hub, what.strip("$ "))) >= 4 and not hub.faults

    def test_at_most_six_attempts(self, hub, quick):
        hub.fail("PUT ", times=99)
        with pytest.raises(RuntimeError) as caught:
            commit(hub, {"w.bin": b"1"})
        assert isinstance(caught.value.__cause__, HfHubHTTPError) and len(asked(hub, "PUT")) == 6

    @pytest.mark.parametrize(
        "what", ["/commit/", "repos/create", "validate-yaml", "GET /api/models/[^/]+/[^/]+$", "paths-info"]
    )
    def test_requests_without_retries(self, hub, what):
        def call() -> None:
            api(hub).create_repo("zoo/other", exist_ok=True)
            api(hub).model_info(NAME)
            api(hub).get_paths_info(NAME, ["README.md"])
            commit(hub, {"README.md": b"new"})

        hub.fail(what)
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 503
        hub.drop_answer(what)
        with pytest.raises(HTTPError) as caught:
            call()
        assert not isinstance(caught.value, OSError)  # a HfHubHTTPError is one
        assert not hub.faults

    def test_commit_with_lost_response(self, hub):
        before = hub.sha(KEY)
        operation = CommitOperationAdd("new", b"1")
        hub.drop_answer("/commit/")
        with pytest.raises(HTTPError, match="disconnected"):
            api(hub).create_commit(NAME, [operation], commit_message="change", parent_commit=before)
        assert hub.files(KEY)["new"] == b"1" and len(hub.commits(KEY)) == 2
        # The same operation object caches that the file was missing; a new one requests it again.
        with pytest.raises(HfHubHTTPError, match="412"):
            api(hub).create_commit(NAME, [operation], commit_message="change", parent_commit=before)
        assert commit(hub, {"new": b"1"}, parent_commit=before).oid == hub.sha(KEY) and len(hub.commits(KEY)) == 2
        # A pull request is opened twice.
        hub.drop_answer("/commit/")
        with pytest.raises(HTTPError, match="disconnected"):
            commit(hub, {"new": b"2"}, create_pr=True)
        assert commit(hub, {"new": b"2"}, create_pr=True).pr_num == 2

    def test_cut_upload(self, hub, quick):
        hub.cut("PUT ", 1000)
        hub.cut("PUT ", 1000, reset=True)
        commit(hub, {"w.bin": WEIGHTS[::-1]})
        assert len(asked(hub, "PUT")) == 3 and hub.files(KEY)["w.bin"] == WEIGHTS[::-1]
        hub.cut("/commit/", 10)
        with pytest.raises(HTTPError):
            commit(hub, {"w.bin": b"1"})
        assert hub.files(KEY)["w.bin"] == WEIGHTS[::-1]

    @pytest.mark.parametrize("redirect", [True, False])
    def test_cut_download_is_resumed(self, hub, tmp_path, quick, redirect):
        hub.redirect = redirect
        hub.cut("GET .*safetensors", 100_000, times=2)
        assert self.download(hub, tmp_path) == WEIGHTS and len(asked(hub, "GET")) == 3
        # Without progress it stops after six attempts, and keeps nothing.
        hub.cut("GET .*README", times=99)
        with pytest.raises(HTTPError, match="peer closed connection"):
            self.download(hub, tmp_path, "README.md")
        assert len(asked(hub, "GET")) == 3 + 6
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".incomplete")]

    def test_reset_download_is_not_resumed(self, hub, tmp_path):
        hub.cut("GET /cdn", 100_000, reset=True)
        with pytest.raises(HTTPError, match="reset"):
            self.download(hub, tmp_path)
        assert len(asked(hub, "GET")) == 1 and self.download(hub, tmp_path) == WEIGHTS

    def test_corrupted_download_is_kept(self, hub, tmp_path):
        hub.corrupt("GET /cdn", 1000)
        wrong = self.download(hub, tmp_path)
        assert sum(a != b for a, b in zip(wrong, WEIGHTS, strict=True)) == 1
        assert self.download(hub, tmp_path) == wrong  # from the cache
        snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path)
        found = api(hub).verify_repo_checksums(NAME, cache_dir=tmp_path)
        assert [entry["path"] for entry in found.mismatches] == [LARGE]
        assert self.download(hub, tmp_path, force_download=True) == WEIGHTS
        assert not api(hub).verify_repo_checksums(NAME, cache_dir=tmp_path).mismatches

    def test_metadata_and_content(self, hub, tmp_path, quick):
        """A 503 is retried for HEAD, but not for GET; a 429 for both."""
        hub.fail("HEAD", 503)
        hub.fail("GET", 429, headers={"Retry-After": "0"})
        assert self.download(hub, tmp_path / "1") == WEIGHTS
        hub.fail("GET", 503)
        with pytest.raises(HfHubHTTPError, match="503"):
            self.download(hub, tmp_path / "2")
        hub.fail("HEAD", 403)
        with pytest.raises(LocalEntryNotFoundError):
            self.download(hub, tmp_path / "2")

    def test_hub_down(self, hub, tmp_path):
        """An earlier snapshot is returned without a warning, unless it is incomplete."""
        old = snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path)
        hub.commit(KEY, {"README.md": b"new"})
        hub.fail("GET /api", times=99)
        assert snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path) == old
        (Path(old) / "README.md").unlink()
        with pytest.raises(IncompleteSnapshotError):
            snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path)
        with pytest.raises(LocalEntryNotFoundError):
            snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path / "none")

    def test_slow(self, hub, tmp_path, quick, monkeypatch):
        monkeypatch.setattr(hf_constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        hub.delay("GET /cdn", 1)
        assert self.download(hub, tmp_path) == WEIGHTS and len(asked(hub, "GET /cdn")) == 2

    def test_delayed_fault(self, hub, tmp_path):
        hub.fail("GET .*/api/models", 500, after=1)
        api(hub).model_info(NAME)
        with pytest.raises(HfHubHTTPError, match="500"):
            api(hub).model_info(NAME)
        api(hub).model_info(NAME)
