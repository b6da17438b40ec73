"""The page: its three tabs, and the server."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from res2net_zoo.space import block_tab, choose_tab, try_tab
from res2net_zoo.space.models import Models
from res2net_zoo.space.uploads import MOST_BYTES
from res2net_zoo.utils.errors import InputError, one_line

SWEEP, KEEP = 30, 120  # seconds between deletions of uploads, and their age
# Only fonts of the system: others would be fetched from another host.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
# For more columns on a narrow page.
CSS = "#catalogue :is(th, [role=gridcell]) * {font-family: var(--font); font-size: 13px}"


def create_app(models: Models, examples: Sequence[Path]) -> gr.Blocks:
    """Create the page.

    Args:
        models: The models that it offers.
        examples: Images to start from.
    """
    with gr.Blocks(title="Res2Net Zoo", analytics_enabled=False, delete_cache=(SWEEP, KEEP)) as app:
        gr.Markdown("# Res2Net Zoo")
        with gr.Tabs() as tabs:
            with gr.Tab("Try", id="try"):
                first = try_tab.build(models, examples)
            with gr.Tab("Choose", id="choose"):
                try_it, chosen = choose_tab.build(models)
            with gr.Tab("Block", id="block"):
                block_tab.build()

        def to_try(name: str) -> tuple[gr.Tabs, str]:
            if name not in models.names:
                raise gr.Error(f"{name} lacks weights with a classifier.", print_exception=False)
            return gr.Tabs(selected="try"), name

        try_it.click(to_try, chosen, [tabs, first], show_progress="hidden", api_visibility="private")
    return app


async def refuse_url(*_: Any, **__: Any) -> NoReturn:
    """Refuse the URL of a file in a request; Gradio would download it from any public host, of any size."""
    raise gr.Error("Upload the file itself, not a URL.", print_exception=False)


def check_address(host: str, port: int | None) -> None:
    """Check that the server can listen; Gradio would try a hundred ports, and print an error for each.

    Raises:
        InputError: The address or the port cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {host}: {error.strerror or error}", "port", "host") from error


@contextlib.contextmanager
def serve(models: Models, examples: Sequence[Path], host: str, port: int | None) -> Iterator[str]:
    """Serve the page while the context is active; at its end, uploads are deleted.

    Args:
        models: The models that it offers.
        examples: Images to start from.
        host: Name or address to listen on.
        port: Port, or None for the first free one from 7860.

    Yields:
        The page's URL.

    Raises:
        InputError: The server cannot listen there.
    """
    check_address(host, port)
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks for its own page
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost", host]))
    with tempfile.TemporaryDirectory(prefix="res2net-zoo-space-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read whenever a file is stored
        gr.processing_utils.async_ssrf_protected_download = refuse_url
        app = create_app(models, examples)
        try:
            _, url, _ = app.launch(
                server_name=host,
                server_port=port,
                css=CSS,
                theme=gr.themes.Default(font=SANS, font_mono=MONO),
                max_file_size=MOST_BYTES,
                footer_links=[],
                run_history=False,
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise InputError(f"cannot listen on {host}: {one_line(error)}", "port", "host") from error
        try:
            yield url
        finally:
            app.close(verbose=False)
