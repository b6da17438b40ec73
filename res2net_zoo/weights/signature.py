"""Signatures of model folders, model.sig, by the package model-signing of the Open Source Security Foundation.

A signature covers every file of the folder, except itself and what git and huggingface_hub add. It is checked before
any other file of the folder is read.
"""

import base64
import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from res2net_zoo.utils.console import printable
from res2net_zoo.utils.errors import InputError, clipped, one_line
from res2net_zoo.utils.files import read_bytes, read_json, sweep, write_atomically
from res2net_zoo.utils.hub_client import SIGNATURE as NAME
from res2net_zoo.utils.hub_client import is_blob_of
from res2net_zoo.utils.packages import require
from res2net_zoo.weights.checks import Check

if TYPE_CHECKING:
    from model_signing.hashing import Config as HashingConfig

LARGEST = 16 * 2**20  # bytes of a signature, which lists every file
LARGEST_KEY = 2**20
UNSIGNED = (NAME, ".cache/huggingface")  # model-signing itself leaves out the next
GIT = (".git", ".gitattributes", ".github", ".gitignore")
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
MATERIALS = {"publicKey": "a key", "x509CertificateChain": "a certificate", "certificate": "Sigstore"}


class SignatureError(InputError):
    """A folder without the required signature."""


class Trust(NamedTuple):
    """The accepted signer.

    Attributes:
        name: The key, the certificates or the identity, for messages.
        material: What a signature of this kind contains, one of `MATERIALS`.
        config: A `model_signing.verifying.Config`.
        certificates: The trusted certificates, in PEM.
    """

    name: str
    material: str
    config: Any
    certificates: bytes = b""


class Signer(NamedTuple):
    """The signer.

    Attributes:
        config: A `model_signing.signing.Config`.
        public_key: The public key in PEM; None if signatures are not checked by a key.
        files: The files with the secrets, which must not be in the folder.
    """

    config: Any
    public_key: bytes | None = None
    files: tuple[Path, ...] = ()


def trust_key(path: Path) -> Trust:
    """Accept signatures that a public key verifies.

    Args:
        path: PEM file of an EC key on P-256, P-384 or P-521.

    Raises:
        InputError: It is not such a key, or model-signing is not installed.
    """
    check_installed()
    from cryptography.hazmat.primitives import serialization
    from model_signing import verifying

    content = read_bytes(path, LARGEST_KEY)
    try:
        key = serialization.load_pem_public_key(content)
    except Exception as error:  # cryptography raises various types
        private = "; it is a private key, and the public one is needed" * (b"PRIVATE KEY" in content)
        raise InputError(f"{path} is not a public key in PEM{private}", "public_key") from error
    _check_curve(path, key)
    return Trust(f"the key {path}", "publicKey", verifying.Config().use_elliptic_key_verifier(public_key=path))


def trust_certificates(paths: Sequence[Path]) -> Trust:
    """Accept signatures with a certificate that these certificates vouch for.

    Args:
        paths: PEM files: the root, and intermediate certificates that signatures do not contain.

    Raises:
        InputError: They are not certificates, or model-signing is not installed.
    """
    check_installed()
    from model_signing import verifying

    contents = [_read_certificates(path) for path in paths]
    config = verifying.Config().use_certificate_verifier(certificate_chain=paths)
    return Trust(" and ".join(map(str, paths)), "x509CertificateChain", config, b"\n".join(contents))


def trust_identity(identity: str, provider: str) -> Trust:
    """Accept keyless signatures of Sigstore by an identity. It needs a network.

    Args:
        identity: Mail address or workflow.
        provider: URL of the OpenID Connect provider that confirmed it.

    Raises:
        InputError: Sigstore's keys cannot be downloaded, or model-signing is not installed.
    """
    check_installed()
    from model_signing import verifying

    with _readable_errors("cannot read Sigstore's keys"):
        config = verifying.Config().use_sigstore_verifier(identity=identity, oidc_issuer=provider)
    return Trust(f"{identity} ({provider})", "certificate", config)


def signer_of_key(
    key: Path,
    password: Callable[[], str],
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
) -> Signer:
    """Sign with a private key, alone or with its certificate.

    Args:
        key: PEM file of an EC key on P-256, P-384 or P-521.
        password: Returns the key's password; only called if the key is encrypted.
        certificate: PEM file of its certificate; None to sign without.
        chain: PEM files of the certificates between that one and the root.

    Raises:
        InputError: A file is not what it must be, the password is wrong, or model-signing is not installed.
    """
    check_installed()
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from model_signing import signing

    private, secret = _read_private_key(key, password)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if certificate is None:
        config: Any = signing.Config()  # its password is typed as text, but passed on to a function that takes bytes
        return Signer(config.use_elliptic_key_signer(private_key=key, password=secret), public, (key,))
    if secret is not None:
        raise InputError(f"{key} is encrypted, which model-signing does not support for keys with a certificate", "key")
    for path in (certificate, *chain):
        _read_certificates(path)
    try:
        config = signing.Config().use_certificate_signer(
            private_key=key, signing_certificate=certificate, certificate_chain=chain
        )
    except ValueError as error:
        raise InputError(f"{certificate} is not the certificate of {key}", "certificate") from error
    return Signer(config, files=(key,))


def signer_of_sigstore() -> Signer:
    """Sign by Sigstore without a key: the identity is confirmed in the browser, or by the CI. It needs a network.

    Raises:
        InputError: Sigstore is not reachable, or model-signing is not installed.
    """
    check_installed()
    from model_signing import signing

    with _readable_errors("cannot reach Sigstore"):
        return Signer(signing.Config().use_sigstore_signer(use_ambient_credentials=True))


def sign(folder: Path, signer: Signer) -> bool:
    """Write the signature of a folder, atomically.

    Args:
        folder: The folder.
        signer: The signer.

    Returns:
        Whether it was written; False if the folder already has a valid one of the same key.

    Raises:
        InputError: The folder has a link or a key in it, or the signature fails.
    """
    folder = folder.resolve()
    if inside := [path for path in signer.files if path.resolve().is_relative_to(folder)]:
        raise InputError(f"the private key {inside[0]} is in the folder that is signed; move it elsewhere")
    if links := _links(folder, allowed=False):
        raise InputError(f"{folder / links[0]} is a symbolic link, which cannot be signed; replace it with the file")
    sweep(folder)
    with tempfile.TemporaryDirectory() as name, _readable_errors(f"cannot sign {folder}"):
        if signer.public_key and os.path.lexists(folder / NAME):
            (Path(name) / "key.pub").write_bytes(signer.public_key)
            with contextlib.suppress(InputError):
                if check(folder, trust_key(Path(name) / "key.pub")).passed:
                    return False
        signer.config.set_hashing_config(_hashing_config()).sign(folder, Path(name) / NAME)
        content = (Path(name) / NAME).read_bytes()
    write_atomically(folder / NAME, lambda path: path.write_bytes(content))
    return True


def check(folder: Path, trust: Trust) -> Check:
    """Check the signature of a folder; no other file is parsed.

    Args:
        folder: The folder. Links are accepted only in huggingface_hub's cache, to the files of the same repository.
        trust: The accepted signer.

    Raises:
        InputError: model.sig is not a signature.
    """
    folder, wanted = folder.resolve(), f"signed by {trust.name}"

    def failed(found: str) -> Check:
        return Check("signature", clipped(printable(found)), wanted, False)

    if not os.path.lexists(folder / NAME):
        return failed(f"not signed: {NAME} is missing")
    if links := _links(folder):
        return failed(f"{links[0]} is a symbolic link")
    material, payload = _read(folder / NAME)
    if material != trust.material:
        return failed(f"signed by {MATERIALS[material]}, not by {MATERIALS[trust.material]}")
    logging.getLogger("model_signing").setLevel(logging.CRITICAL)
    hashing = _hashing_config(payload)
    try:
        trust.config.set_hashing_config(hashing).verify(folder, folder / NAME)
        if trust.certificates:
            _check_certificates_now(folder / NAME, trust.certificates)
    except Exception as error:  # cryptography, OpenSSL, pydantic and sigstore raise various types
        if str(error).startswith("Signature mismatch"):
            return failed(_differences(folder, hashing, payload))
        return failed(_reason(error))
    signed = _signed(payload)
    if uncovered := sorted(files_of(folder) - signed.keys()):
        return failed(f"{uncovered[0]} is not covered by the signature")
    return Check("signature", f"{len(signed)} files as signed", wanted, True)


def signed_files(folder: Path) -> dict[str, str]:
    """Return the hashes of the files that a folder's signature covers, by name, without checking it.

    Raises:
        InputError: model.sig is not a signature.
    """
    return _signed(_read(folder / NAME)[1])


def files_of(folder: Path) -> set[str]:
    """Return the files of a folder that a signature must cover."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    return {path.as_posix() for path in paths if not any(path.is_relative_to(left) for left in (*UNSIGNED, *GIT))}


def check_installed() -> None:
    """Check that the packages of the extra `sign` are installed.

    Raises:
        InputError: One is missing.
    """
    require("signatures need", "sign", "model-signing", "pyopenssl")


def _hashing_config(payload: dict[str, Any] | None = None) -> "HashingConfig":
    """Return how files are hashed: by SHA-256, or as a signature states.

    Links are followed only after `_links` has checked them.
    """
    from model_signing import hashing

    config = hashing.Config()
    if payload is not None:
        try:
            stated = payload["predicate"]["serialization"]
            if stated["method"] != "files":
                raise ValueError(f"the method {stated['method']}")
            config.use_file_serialization(hashing_algorithm=stated["hash_type"], allow_symlinks=True)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{NAME} hashes files in an unsupported way: {one_line(error, 100)}") from error
        config.set_allow_symlinks(True)
    covered = [PurePosixPath(name) for name in (_signed(payload) if payload else {})]
    left = [path for path in (*UNSIGNED, *GIT) if not any(name.is_relative_to(path) for name in covered)]
    return config.set_ignored_paths(paths=left, ignore_git_paths=False)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of a signature, one of `MATERIALS`, and its statement, without checking it.

    Raises:
        InputError: It is not a signature.
    """
    try:
        content = read_json(path, LARGEST)
        (material,) = MATERIALS.keys() & content["verificationMaterial"].keys()
        payload = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"], validate=True))
        _signed(payload)
        if not content["dsseEnvelope"]["signatures"]:
            raise ValueError("its list of signatures is empty")
        return material, payload
    except (InputError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = one_line(error, 200) if isinstance(error, InputError) else "its content is incomplete"
        raise InputError(f"{path} is not a signature of model-signing: {reason}") from error


def _signed(payload: dict[str, Any]) -> dict[str, str]:
    """Return the hash of every signed file."""
    signed = {resource["name"]: resource["digest"] for resource in payload["predicate"]["resources"]}
    if not all(isinstance(text, str) for pair in signed.items() for text in pair):
        raise TypeError("a name or a hash is not text")
    return signed


def _links(folder: Path, allowed: bool = True) -> list[str]:
    """Return the symbolic links in a folder, without those to files of huggingface_hub's cache if these are allowed."""

    def is_allowed(link: Path) -> bool:
        # Unlike `Path.resolve`, `realpath` raises no error for a link to itself.
        target = Path(os.path.realpath(link))
        return allowed and target.is_file() and is_blob_of(folder, target)

    links = (path for path in sorted(folder.rglob("*")) if path.is_symlink() and not is_allowed(path))
    return [path.relative_to(folder).as_posix() for path in links]


def _differences(folder: Path, hashing: "HashingConfig", payload: dict[str, Any]) -> str:
    """Return which files of a folder differ from the signed ones, are missing or were added."""
    signed = _signed(payload)
    there = {part.identifier: part.digest.digest_hex for part in hashing.hash(folder).resource_descriptors()}
    found = [f"{name} was added" for name in sorted(there.keys() - signed.keys())]
    found += [f"{name} is missing" for name in sorted(signed.keys() - there.keys())]
    found += [f"{name} differs" for name in sorted(signed.keys() & there.keys()) if signed[name] != there[name]]
    return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


def _reason(error: Exception) -> str:
    """Return why a signature is not accepted."""
    if type(error).__name__ == "InvalidSignature" or str(error).startswith("Key mismatch"):
        return "made by another key, or damaged"
    return one_line(error, 200)


def _check_certificates_now(path: Path, trusted: bytes) -> None:
    """Check that the certificates of a signature are valid today; model-signing checks the date of issue.

    Args:
        path: The signature.
        trusted: The trusted certificates, in PEM.

    Raises:
        X509StoreContextError: One has expired.
    """
    from cryptography import x509
    from OpenSSL import crypto

    material = read_json(path, LARGEST)["verificationMaterial"]["x509CertificateChain"]["certificates"]
    chain = [x509.load_der_x509_certificate(base64.b64decode(part["rawBytes"])) for part in material]
    own, *others = map(crypto.X509.from_cryptography, chain)
    store = crypto.X509Store()
    for certificate in x509.load_pem_x509_certificates(trusted):
        store.add_cert(crypto.X509.from_cryptography(certificate))
    crypto.X509StoreContext(store, own, others).verify_certificate()


def _read_private_key(path: Path, password: Callable[[], str]) -> tuple[Any, bytes | None]:
    from cryptography.hazmat.primitives import serialization

    content, secret = read_bytes(path, LARGEST_KEY), None
    try:
        try:
            key = serialization.load_pem_private_key(content, None)
        except TypeError:  # it is encrypted
            secret = password().encode()
            key = serialization.load_pem_private_key(content, secret)
    except InputError:
        raise
    except Exception as error:  # cryptography raises various types
        problem = "is not a private key in PEM" if secret is None else "cannot be decrypted: the password is wrong"
        raise InputError(f"{path} {problem}", "key", "sign_with") from None if secret else error
    _check_curve(path, key.public_key())
    return key, secret


def _check_curve(path: Path, key: Any) -> None:
    if getattr(getattr(key, "curve", None), "name", None) not in CURVES:
        raise InputError(f"{path} is not an EC key on {', '.join(CURVES.values())}; model-signing supports only these")


def _read_certificates(path: Path) -> bytes:
    from cryptography import x509

    content = read_bytes(path, LARGEST_KEY)
    try:
        x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise InputError(f"{path} is not a certificate in PEM") from error
    return content


@contextlib.contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """Replace errors of model-signing and sigstore by one-line messages."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # of the network, of sigstore, of tuf
        raise InputError(f"{what}: {one_line(error)}") from error
