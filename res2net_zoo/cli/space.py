"""Open a page in the browser to try, choose and design models.

Usage: res2net-zoo space [--host ADDRESS] [--port N] [--model NAME ...]

The page is served until Ctrl-C, on loopback only unless --host names another address. It sends nothing to other hosts;
weights are downloaded when a model is chosen. Uploaded images are deleted within minutes.

Examples:
  res2net-zoo space
  res2net-zoo space --model local-dir:outputs/mine --port 8000

Exit codes: 0 done; 2 bad input.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import add_backend, add_machine
from res2net_zoo.cli.shipped import shipped, shipped_model
from res2net_zoo.utils.command_line import within
from res2net_zoo.utils.packages import require

LOOPBACK = "127.0.0.1"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--host", metavar="ADDRESS", default=LOOPBACK, help="address to listen on (default: %(default)s)")
    add("--port", type=within(int, 1, 65535), help="port (default: the first free one from 7860)")
    add(
        "--model",
        nargs="+",
        default=[],
        help="additional models, such as local-dir:DIR, selected at the start",
    )
    add("--browser", action="store_true", help="open the page in the default browser")
    add_machine(add, workers=False)
    add_backend(add, "torch", "torch")
    return parser.parse_args(argv)


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    import webbrowser

    from res2net_zoo.utils.console import warn
    from res2net_zoo.utils.processes import start_processes
    from res2net_zoo.utils.shutdown import handled_signals

    require("the page needs", "space", "gradio", "grad-cam", "matplotlib")
    from res2net_zoo.space.app import serve
    from res2net_zoo.space.models import Models

    accelerator = start_processes(args.threads, args.mixed_precision)
    models = Models(accelerator, args.backend, shipped_model(), args.model)
    for name in args.model:
        models.load(name)
    for number in set(handled_signals()) - {signal.SIGINT}:
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # deletes uploads, as Ctrl-C does
    with serve(models, sorted(shipped("space", "examples").glob("*.png")), args.host, args.port) as url:
        if args.host not in (LOOPBACK, "localhost", "::1"):
            warn(f"anyone who can reach {args.host} can use the page")
        print(f"the page is at {url} until Ctrl-C", flush=True)
        if args.browser:
            webbrowser.open(url)
        threading.Event().wait()
    return 0
