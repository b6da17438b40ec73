"""Sign a model folder, so that others can verify its origin.

Usage: res2net-zoo sign DIR --key KEY [--certificate FILE [--certificate-chain FILE ...]]

The signature, model.sig, covers every file of the folder, except what git and huggingface_hub add. It follows OpenSSF
Model Signing; the command `model_signing` verifies it as well. If the bill of materials is missing or older than the
card, it is written first. Sign again after each change of the folder.

Examples:
  res2net-zoo sign outputs/mine --key key.pem
  res2net-zoo sign outputs/mine --key key.pem --certificate me.crt --certificate-chain between.crt
  res2net-zoo sign outputs/mine --key sigstore

To create a private and a public key:
  openssl ecparam -name prime256v1 -genkey -noout -out key.pem
  openssl ec -in key.pem -pubout -out key.pub

Exit codes: 0 done; 2 bad input.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.keys import KEY_HELP, add_certificate, check_certificate, sign_folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="model folder to sign")
    parser.add_argument("--key", type=Path, required=True, metavar="KEY", help=KEY_HELP)
    add_certificate(parser.add_argument, "--key")
    args = parser.parse_args(argv)
    check_certificate(parser, args, args.key)
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.utils.files import locked
    from res2net_zoo.weights.model_names import check_folder

    folder = check_folder(str(args.folder).removeprefix("local-dir:"))
    with locked(folder):
        print(sign_folder(args, folder, args.key))
    return 0
