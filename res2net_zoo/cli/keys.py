"""Options of signatures, shared by several programs, and the keys that they name."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from res2net_zoo.weights.signature import Signer, Trust

PASSWORD = "RES2NET_ZOO_KEY_PASSWORD"
SIGSTORE = "sigstore"
KEY_HELP = (
    f"private key, a PEM file (EC; if encrypted, its password is read from {PASSWORD} or the terminal), or {SIGSTORE}"
)


def add_trust(add: Callable[..., object], advice: str) -> None:
    """Add the options that select the accepted signer; `advice` describes what they do in the program."""
    add("--public-key", type=Path, metavar="KEY", help=f"{advice} by this key, a PEM file")
    add(
        "--certificate-chain",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"{advice} with a certificate issued by those in these PEM files",
    )
    add("--identity", metavar="NAME", help=f"{advice} by Sigstore for this email address or workflow (needs a network)")
    add("--identity-provider", metavar="URL", help="with --identity: the OpenID Connect provider that confirmed it")


def check_trust(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check that at most one of the options of `add_trust` is given."""
    if bool(args.identity) != bool(args.identity_provider):
        parser.error("--identity and --identity-provider must be used together")
    if sum(map(bool, (args.public_key, args.certificate_chain, args.identity))) > 1:
        parser.error("--public-key, --certificate-chain and --identity are mutually exclusive; choose one")


def trust_of(args: argparse.Namespace) -> "Trust | None":
    """Return the accepted signer; None without an option of `add_trust`."""
    if not (args.public_key or args.certificate_chain or args.identity):
        return None
    from res2net_zoo.weights import signature

    if args.public_key:
        return signature.trust_key(args.public_key)
    if args.certificate_chain:
        return signature.trust_certificates(args.certificate_chain)
    return signature.trust_identity(args.identity, args.identity_provider)


def add_certificate(add: Callable[..., object], key: str) -> None:
    """Add the certificate of a private key, which the option `key` names."""
    add(
        "--certificate",
        type=Path,
        metavar="FILE",
        help=f"certificate of {key}, a PEM file, to include in the signature",
    )
    add(
        "--certificate-chain",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="with --certificate: PEM files of the certificates between it and the root",
    )


def check_certificate(parser: argparse.ArgumentParser, args: argparse.Namespace, key: Path | None) -> None:
    """Check that a certificate has its key."""
    if args.certificate_chain and not args.certificate:
        parser.error("--certificate-chain needs --certificate")
    if args.certificate and (key is None or str(key) == SIGSTORE):
        parser.error("--certificate needs the private key of the certificate")


def signer_of(args: argparse.Namespace, key: Path) -> "Signer":
    """Return the signer: a key or Sigstore."""
    from res2net_zoo.weights import signature

    if str(key) == SIGSTORE:
        return signature.signer_of_sigstore()
    return signature.signer_of_key(key, lambda: password_of(key), args.certificate, args.certificate_chain)


def sign_folder(args: argparse.Namespace, folder: Path, key: Path) -> str:
    """Sign a model folder, after its bill of materials is renewed if necessary; return what was done."""
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.files import check_writable
    from res2net_zoo.weights import bill_of_materials, signature

    for name in bill_of_materials.ESSENTIAL:
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a model folder: {name} is missing")
    signer = signer_of(args, key)
    check_writable(folder)
    bill_of_materials.renew(folder)
    if not signature.sign(folder, signer):
        return f"{folder / signature.NAME} is up to date"
    return f"{folder / signature.NAME}: {len(signature.signed_files(folder))} files signed"


def password_of(key: Path) -> str:
    """Return the password of a key, from the environment or the terminal; it is not stored anywhere."""
    import getpass
    import os
    import sys

    from res2net_zoo.utils.errors import InputError

    if PASSWORD in os.environ:
        return os.environ[PASSWORD]
    if not sys.stdin.isatty():
        raise InputError(f"{key} is encrypted; set {PASSWORD} to its password, or run this in a terminal")
    try:
        return getpass.getpass(f"password of {key}: ")
    except EOFError as error:
        raise InputError(f"{key} is encrypted, and its password is missing") from error
