"""Signatures of model folders: `sign`, `verify --public-key`, `mirror --public-key`, `publish --sign-with`."""

import base64
import contextlib
import datetime
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import timm

from res2net_zoo import catalog, cli
from res2net_zoo.weights import bill_of_materials, fingerprint, signature
from res2net_zoo.weights.card import model_card
from res2net_zoo.weights.model_folder import write_model_folder
from tests.conftest import SHIPPED_MODEL, input_error, read_tree

pytest.importorskip("model_signing")

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Keys(NamedTuple):
    private: Path
    public: Path


def write_keys(folder: Path, name: str, key=None, password: bytes | None = None) -> Keys:
    key = key or ec.generate_private_key(ec.SECP256R1())
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub")
    keys.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    keys.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return keys


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    """A folder for keys, outside of every model folder."""
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def keys(secrets) -> Keys:
    return write_keys(secrets, "mine")


@pytest.fixture(scope="module")
def others(secrets) -> Keys:
    return write_keys(secrets, "other")


@pytest.fixture(scope="module")
def signed_model(keys, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(SHIPPED_MODEL, tmp_path_factory.mktemp("signed") / "model"))
    assert signature.sign(folder, signature.signer_of_key(keys.private, lambda: "")) is True
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "model"))


@pytest.fixture
def signed(signed_model, tmp_path) -> Path:
    return Path(shutil.copytree(signed_model, tmp_path / "signed"))


def run(*words: object) -> subprocess.CompletedProcess:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def refused(result: subprocess.CompletedProcess, words: str) -> None:
    """Check that a signature failed: one line on stderr, exit code 1, and one row in the table."""
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and words in line and "Traceback" not in line, (result.stdout, result.stderr)
    rows = [row for row in result.stdout.splitlines() if row.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["signature"] and "| FAILED |" in rows[2]


def model_signing(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


class TestSignAndVerify:
    def test_signed_folder_verifies(self, folder, keys, tmp_path):
        done = run("sign", folder, "--key", keys.private)
        assert (done.returncode, done.stderr) == (0, "") and "9 files signed" in done.stdout
        before = read_tree(folder)
        result = run("verify", folder, "--public-key", keys.public, "--output", tmp_path / "checks.json")
        assert result.returncode == 0, result.stdout
        checks = json.loads((tmp_path / "checks.json").read_text())
        names = [check["check"] for check in checks]
        order = ["signature", "SHA-256 of model.safetensors", "bill of materials", "catalogue", "strict load", "logits"]
        assert [name for name in names if name in order] == order
        assert {check["check"]: check["passed"] for check in checks}["signature"] is True
        rows = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("| ")]
        assert rows[2:] == names and read_tree(folder) == before
        # Signed again it stays the same; by another key it is replaced.
        assert "up to date" in run("sign", folder, "--key", keys.private).stdout and read_tree(folder) == before

    def test_without_a_key_the_signature_is_only_reported(self, signed):
        assert "model.sig, not checked" in run("verify", signed).stdout
        (signed / "model.sig").unlink()
        assert "| not signed" in run("verify", signed).stdout

    def test_the_checks_are_not_written_into_the_folder(self, signed, keys):
        before = read_tree(signed)
        line = input_error(run("verify", signed, "--public-key", keys.public, "--output", signed / "checks.json"))
        assert "is in the folder that is verified" in line and "--output" in line and read_tree(signed) == before

    def test_model_signing_verifies_our_folders_and_we_verify_its_folders(self, signed, keys, others):
        where = ("--signature", signed / "model.sig", "--public_key")
        done = model_signing("verify", "key", signed, *where, keys.public)
        assert done.returncode == 0, done.stderr
        assert model_signing("verify", "key", signed, *where, others.public).returncode != 0
        (signed / "model.sig").unlink()
        done = model_signing(
            "sign", "key", signed, "--signature", signed / "model.sig", "--private_key", others.private
        )
        assert done.returncode == 0, done.stderr
        assert run("verify", signed, "--public-key", others.public).returncode == 0
        (signed / "config.json").write_text("{")
        refused(run("verify", signed, "--public-key", others.public), "config.json differs")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json differs"),
            (lambda f: (f / "evil.py").write_text("x"), "evil.py was added"),
            (lambda f: (f / ".env").write_text("x"), ".env was added"),
            (lambda f: (f / "sub").mkdir() or (f / "sub/x").write_text("x"), "sub/x was added"),
            (lambda f: (f / "metrics.csv").unlink(), "metrics.csv is missing"),
            (lambda f: (f / "model.sig").unlink(), "not signed: model.sig is missing"),
            (lambda f: (f / "link.json").symlink_to("config.json"), "link.json is a symbolic link"),
            (lambda f: (f / "link").symlink_to("/tmp"), "link is a symbolic link"),
            (lambda f: (f / "link").symlink_to("link"), "link is a symbolic link"),
            (lambda f: os.mkfifo(f / "pipe"), "pipe"),
        ],
    )
    def test_changed_folder_is_refused_and_not_read(self, signed, keys, change, words, monkeypatch):
        """Reading a config that is nested too deeply, or calling these functions, would fail."""
        change(signed)
        for module, name in ((fingerprint, "read"), (bill_of_materials, "check")):
            monkeypatch.setattr(module, name, lambda *args: pytest.fail("the folder is read"))
        refused(run("verify", signed, "--public-key", keys.public), words)

    def test_a_config_is_replaced_by_a_link(self, signed, keys, tmp_path):
        (signed / "config.json").rename(tmp_path / "config.json")
        (signed / "config.json").symlink_to(tmp_path / "config.json")
        refused(run("verify", signed, "--public-key", keys.public), "config.json is a symbolic link")

    def test_another_key(self, signed, others):
        refused(run("verify", signed, "--public-key", others.public), "made by another key")

    def test_signature_of_another_folder(self, signed, keys):
        other = signed.parent / "other"
        shutil.copytree(signed, other)
        (other / "config.json").write_text("{}")
        assert signature.sign(other, signature.signer_of_key(keys.private, lambda: ""))
        shutil.copy(other / "model.sig", signed)
        refused(run("verify", signed, "--public-key", keys.public), "config.json differs")

    def test_files_that_the_hub_and_git_add_are_left_out(self, signed, keys):
        for name in (".cache/huggingface/download/x.metadata", ".git/config", ".gitattributes"):
            (signed / name).parent.mkdir(parents=True, exist_ok=True)
            (signed / name).write_text("x")
        assert run("verify", signed, "--public-key", keys.public).returncode == 0

    def test_a_signature_that_leaves_out_a_file(self, folder, keys):
        config = folder / "config.json"
        place = ("--signature", folder / "model.sig", "--private_key", keys.private)
        assert model_signing("sign", "key", folder, *place, "--ignore-paths", config).returncode == 0
        refused(run("verify", folder, "--public-key", keys.public), "config.json is not covered")

    @pytest.mark.parametrize(
        "content", [b"", b"x", b"[]", b"{}", b"\xff", b"[" * 100_000, "truncated", "payload", "hash"]
    )
    def test_not_a_signature(self, signed, keys, content):
        whole = (signed / "model.sig").read_bytes()
        parsed = json.loads(whole)
        if content == "truncated":
            content = whole[: len(whole) // 2]
        elif content == "payload":
            parsed["dsseEnvelope"]["payload"] = "!"
            content = json.dumps(parsed).encode()
        elif content == "hash":
            statement = json.loads(base64.b64decode(parsed["dsseEnvelope"]["payload"]))
            statement["predicate"]["serialization"] = {"method": "magic"}
            parsed["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
            content = json.dumps(parsed).encode()
        (signed / "model.sig").write_bytes(content)
        line = input_error(run("verify", signed, "--public-key", keys.public))
        assert "not a signature" in line or "unsupported way" in line

    @pytest.mark.parametrize("change", [lambda s: {"sig": s["sig"][:40]}, lambda s: {"sig": ""}, lambda s: {}])
    def test_a_damaged_signature(self, signed, keys, change):
        content = json.loads((signed / "model.sig").read_text())
        (made,) = content["dsseEnvelope"]["signatures"]
        content["dsseEnvelope"]["signatures"] = [change(made)]
        (signed / "model.sig").write_text(json.dumps(content))
        refused(run("verify", signed, "--public-key", keys.public), "signature")

    def test_an_exported_file_has_no_signature(self, keys, tmp_path):
        (tmp_path / "x.onnx").write_bytes(b"x")
        assert "covers a folder" in input_error(run("verify", tmp_path / "x.onnx", "--public-key", keys.public))


class TestKeys:
    def test_bad_keys(self, signed, keys, secrets):
        rsa_keys = write_keys(secrets, "rsa", rsa.generate_private_key(65537, 2048))
        curve = write_keys(secrets, "curve", ec.generate_private_key(ec.SECP256K1()))
        (secrets / "text").write_text("hello")
        for key, words in (
            (keys.private, "the public one is needed"),
            (secrets / "text", "is not a public key"),
            (secrets / "missing", "No such file"),
            (rsa_keys.public, "is not an EC key"),
            (curve.public, "is not an EC key"),
        ):
            assert words in input_error(run("verify", signed, "--public-key", key))
        before = read_tree(signed)
        for key, words in (
            (keys.public, "is not a private key"),
            (secrets / "text", "is not a private key"),
            (secrets / "missing", "No such file"),
            (rsa_keys.private, "is not an EC key"),
        ):
            assert words in input_error(run("sign", signed, "--key", key))
        assert read_tree(signed) == before

    def test_encrypted_key(self, folder, secrets, monkeypatch):
        hidden = write_keys(secrets, "hidden", ec.generate_private_key(ec.SECP384R1()), b"pass phrase")
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        assert "set RES2NET_ZOO_KEY_PASSWORD" in input_error(run("sign", folder, "--key", hidden.private))
        monkeypatch.setenv("RES2NET_ZOO_KEY_PASSWORD", "wrong")
        line = input_error(run("sign", folder, "--key", hidden.private))
        assert "the password is wrong" in line and "wrong\n" not in line
        monkeypatch.setenv("RES2NET_ZOO_KEY_PASSWORD", "pass phrase")
        done = run("sign", folder, "--key", hidden.private)
        assert done.returncode == 0 and "pass phrase" not in done.stdout + done.stderr
        assert signature.check(folder, signature.trust_key(hidden.public)).passed

    def test_the_key_must_not_be_in_the_folder(self, folder, keys):
        shutil.copy(keys.private, folder / "key.pem")
        assert "key.pem is in the folder" in input_error(run("sign", folder, "--key", folder / "key.pem"))
        assert not (folder / "model.sig").exists()

    def test_folders_that_cannot_be_signed(self, folder, keys, tmp_path):
        assert "there is no model folder" in input_error(run("sign", tmp_path / "nothing", "--key", keys.private))
        assert "model.safetensors is missing" in input_error(run("sign", tmp_path, "--key", keys.private))
        (folder / "more.json").symlink_to("config.json")
        assert "more.json is a symbolic link" in input_error(run("sign", folder, "--key", keys.private))
        (folder / "more.json").unlink()
        (folder / "config.json").write_text("{}")
        line = input_error(run("sign", folder, "--key", keys.private))
        assert "does not describe the folder: config.json differs" in line

    def test_the_bill_of_materials_is_renewed_before(self, folder, keys):
        (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
        assert bill_of_materials.check(folder).passed is None
        assert run("sign", folder, "--key", keys.private).returncode == 0
        assert bill_of_materials.check(folder).passed
        assert run("verify", folder, "--public-key", keys.public).returncode == 0

    def test_files_that_were_added_are_in_the_bill_of_a_signed_folder(self, folder, keys):
        (folder / "more.json").write_text("{}")
        assert run("sign", folder, "--key", keys.private).returncode == 0
        assert '"more.json"' in (folder / "bom.cdx.json").read_text()
        assert run("verify", folder, "--public-key", keys.public).returncode == 0

    def test_folders_of_downloads_signed_by_the_package_itself(self, folder, keys):
        cache = folder / ".cache" / "huggingface"
        cache.mkdir(parents=True)
        (cache / ".gitignore").write_text("*")
        done = model_signing("sign", "key", folder, "--signature", folder / "model.sig", "--private_key", keys.private)
        assert done.returncode == 0, done.stderr
        assert run("verify", folder, "--public-key", keys.public).returncode == 0

    def test_a_folder_that_is_written_again_loses_its_signature(self, signed):
        write_model_folder(signed, timm.create_model("res2net_tiny"), model_card("tiny", "# tiny", "mit"))
        assert not (signed / "model.sig").exists() and bill_of_materials.check(signed).passed


def certificate(name: str, key, issuer: x509.Certificate | None, by, days: tuple[int, int], authority: bool):
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    usage |= {"encipher_only": False, "decipher_only": False, "digital_signature": not authority}
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + days[0] * DAY)
        .not_valid_after(NOW + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=authority, crl_sign=authority, **usage), critical=True)
        .sign(by, hashes.SHA256())
    )


class TestCertificates:
    @pytest.fixture(scope="class")
    def chain(self, secrets) -> Path:
        """Keys and certificates: a root, one between, and two of the signer, of which one has expired."""
        root, between, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        authority = certificate("root", root, None, root, (-90, 90), True)
        middle = certificate("between", between, authority, root, (-90, 90), True)
        made = {
            "root": authority,
            "between": middle,
            "valid": certificate("me", own, middle, between, (-1, 30), False),
            "expired": certificate("me", own, middle, between, (-60, -30), False),
            "stranger": certificate("stranger", own, None, own, (-1, 30), True),
        }
        for name, made_one in made.items():
            (secrets / f"{name}.crt").write_bytes(made_one.public_bytes(Encoding.PEM))
        write_keys(secrets, "own", own)
        return secrets

    def sign(self, folder: Path, chain: Path, own: str) -> subprocess.CompletedProcess:
        certificates = ["--certificate", chain / f"{own}.crt", "--certificate-chain", chain / "between.crt"]
        return run("sign", folder, "--key", chain / "own.pem", *certificates)

    def test_certificate(self, folder, chain, keys):
        assert self.sign(folder, chain, "valid").returncode == 0
        result = run("verify", folder, "--certificate-chain", chain / "root.crt")
        assert result.returncode == 0 and "root.crt" in result.stdout
        done = model_signing(
            "verify", "certificate", folder, "--signature", folder / "model.sig",
            "--certificate_chain", chain / "root.crt",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        refused(run("verify", folder, "--certificate-chain", chain / "stranger.crt"), "unable to get")
        refused(run("verify", folder, "--public-key", keys.public), "signed by a certificate, not by a key")

    def test_expired_certificate(self, folder, chain):
        """model-signing accepts it, because it checks the date of issue."""
        assert self.sign(folder, chain, "expired").returncode == 0
        refused(run("verify", folder, "--certificate-chain", chain / "root.crt"), "expired")

    def test_bad_certificates(self, folder, chain, keys):
        own = ["--key", chain / "own.pem", "--certificate"]
        assert "is not a certificate" in input_error(run("sign", folder, *own, keys.public))
        line = input_error(run("sign", folder, "--key", keys.private, "--certificate", chain / "valid.crt"))
        assert "is not the certificate of" in line
        assert "is not a certificate" in input_error(run("verify", folder, "--certificate-chain", keys.public))
        for words in (
            ["--public-key", "a", "--certificate-chain", "b"],
            ["--identity", "me@example.org"],
        ):
            assert run("verify", folder, *words).returncode == 2
        assert run("sign", folder, "--key", keys.private, "--certificate-chain", "x").returncode == 2
        assert run("sign", folder, "--key", "sigstore", "--certificate", "x").returncode == 2


class TestHub:
    REPO, KEY = "zoo/tiny", "models/zoo/tiny"

    def test_published_signature_verifies_from_the_cache(self, hub, folder, keys, others):
        """In huggingface_hub's cache, a repository is a folder of links."""
        (folder / "notes.pdf").write_bytes(b"not among the files that are usually downloaded")
        words = ["publish", folder, "--repo-id", self.REPO, "--sign-with", keys.private]
        plan = run(*words, "--dry-run")
        assert plan.returncode == 0 and "would sign" in plan.stdout and not (folder / "model.sig").exists()
        assert run(*words).returncode == 0
        files = hub.files(self.KEY)
        assert {"model.sig", "bom.cdx.json"} <= files.keys() and files["model.sig"] == (
            folder / "model.sig"
        ).read_bytes()
        assert "is up to date" in run(*words).stdout
        result = run("verify", self.REPO, "--public-key", keys.public)
        assert result.returncode == 0 and "| FAILED |" not in result.stdout, result.stdout
        refused(run("verify", self.REPO, "--public-key", others.public), "made by another key")
        hub.commit(self.KEY, {"evil.txt": b"x"})
        refused(run("verify", self.REPO, "--public-key", keys.public), "evil.txt was added")
        assert (
            run("verify", self.REPO, "--public-key", keys.public, "--revision", hub.commits(self.KEY)[1].sha).returncode
            == 0
        )

    def test_links_in_the_cache_to_elsewhere_are_refused(self, hub, signed, keys):
        hub.add(self.KEY, signed)
        assert run("verify", self.REPO, "--public-key", keys.public).returncode == 0
        from res2net_zoo.utils.hub_client import snapshot

        cached = snapshot(self.REPO)
        (cached / "config.json").unlink()
        (cached / "config.json").symlink_to(signed / "config.json")
        assert "config.json is a symbolic link" in signature.check(cached, signature.trust_key(keys.public)).found

    def test_links_in_the_cache_to_folders_are_refused(self, hub, signed, keys):
        hub.add(self.KEY, signed)
        from res2net_zoo.utils.hub_client import snapshot

        cached = snapshot(self.REPO)
        blobs = cached.parent.parent / "blobs"
        (blobs / "more").mkdir()
        (cached / "backbone").symlink_to(blobs / "more")
        assert "backbone is a symbolic link" in signature.check(cached, signature.trust_key(keys.public)).found

    def test_names_that_are_not_text_are_no_signature(self, hub, signed, keys):
        content = json.loads((signed / "model.sig").read_text())
        payload = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
        payload["predicate"]["resources"] = [{"name": 1, "digest": "x"}]
        content["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
        (signed / "model.sig").write_text(json.dumps(content))
        for words in (["verify", signed, "--public-key", keys.public], ["publish", signed, "--repo-id", "zoo/x"]):
            assert "is not a signature" in input_error(run(*words))

    def test_publish_refuses_a_signature_of_other_files(self, hub, signed):
        words = ["publish", signed, "--repo-id", self.REPO]
        (signed / "notes.txt").write_text("new")
        assert "notes.txt has changed since" in input_error(run(*words)) and not hub.repositories
        (signed / "notes.txt").unlink()
        (signed / "metrics.csv").unlink()
        assert "metrics.csv has changed since" in input_error(run(*words))

    def test_publish_refuses_a_signature_of_hidden_files(self, hub, folder, keys):
        (folder / ".DS_Store").write_text("x")
        line = input_error(run("publish", folder, "--repo-id", self.REPO, "--sign-with", keys.private))
        assert ".DS_Store is signed, but is not uploaded" in line and not hub.repositories


class TestMirror:
    @pytest.fixture
    def entry(self, hub, keys, tmp_path, monkeypatch) -> Iterator[str]:
        """The shipped model in the place of a checkpoint of the catalogue, signed."""
        from res2net_zoo.hub import mirror

        made = Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "made"))
        signature.sign(made, signature.signer_of_key(keys.private, lambda: ""))
        checkpoint = catalog.load().checkpoints["dla60_res2next.in1k"]
        hub.add(f"models/{checkpoint.hub_id}", made)
        monkeypatch.setattr(mirror, "_damages", lambda folder, checkpoint: [])
        return checkpoint.name

    def mirror(self, tmp_path: Path, *words: object) -> subprocess.CompletedProcess:
        return run("mirror", "--to", tmp_path / "mirror", "--model", *words)

    def test_signed_repositories_are_copied_whole(self, entry, keys, others, tmp_path):
        assert self.mirror(tmp_path, entry, "--public-key", keys.public).returncode == 0
        copy = tmp_path / "mirror" / entry
        assert read_tree(copy) == read_tree(tmp_path / "made")
        assert signature.check(copy, signature.trust_key(keys.public)).passed
        assert self.mirror(tmp_path, entry, "--public-key", keys.public).returncode == 0
        result = self.mirror(tmp_path, entry, "--public-key", others.public)
        assert result.returncode == 1 and "made by another key" in result.stderr

    @pytest.mark.parametrize("change", ["another key", "unsigned", "config"])
    def test_nothing_else_is_mirrored(self, hub, entry, keys, others, tmp_path, change):
        repository = f"models/timm/{entry}"
        if change == "unsigned":
            hub.commit(repository, {}, ["model.sig"])
        elif change == "config":
            hub.commit(repository, {"config.json": b"{"})
        key = others if change == "another key" else keys
        result = self.mirror(tmp_path, entry, "--public-key", key.public)
        (line,) = result.stderr.splitlines()
        words = f"timm/{entry} is not signed" if change == "unsigned" else "it is not signed by the key"
        assert result.returncode == 1 and f"{entry} is refused: {words}" in line
        assert [path.name for path in (tmp_path / "mirror").iterdir()] in ([], [".lock"])

    def test_not_a_signature(self, hub, entry, keys, tmp_path):
        hub.commit(f"models/timm/{entry}", {"model.sig": b"x"})
        assert "is not a signature" in input_error(self.mirror(tmp_path, entry, "--public-key", keys.public))
        assert not (tmp_path / "mirror" / entry).exists()

    def test_a_release_is_not_signed(self, hub, entry, keys, tmp_path):
        result = self.mirror(tmp_path, "res2net50_vd_26w_4s.ssld_in1k", "--public-key", keys.public)
        assert result.returncode == 1 and "from its release, which is not signed" in result.stderr
        result = self.mirror(tmp_path, entry, "res2net50_vd_26w_4s.ssld_in1k", "--public-key", keys.public)
        assert result.returncode == 1 and (tmp_path / "mirror" / entry / "model.sig").is_file()
        assert "1 of 2 are refused (res2net50_vd_26w_4s.ssld_in1k)" in result.stderr


def test_without_the_extra(folder, keys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'res2net-zoo[sign]'" in input_error(run("sign", folder, "--key", keys.private))
    assert "pip install 'res2net-zoo[sign]'" in input_error(run("verify", folder, "--public-key", keys.public))
