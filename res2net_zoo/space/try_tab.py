"""The tab "Try": an image, and the answers of one or two models side by side."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from matplotlib import colormaps
from PIL import Image

from res2net_zoo.space.models import Answer, Models, WeightsUnreachableError, call_of
from res2net_zoo.space.uploads import MOST_BYTES, MOST_PIXELS, decode_upload, read_upload
from res2net_zoo.utils.errors import InputError

SMALLEST = 224  # pixels to which smaller pictures are enlarged, for the colours of the map to blend
HINT = (
    f"Choose, paste or take a picture, or take an example. Up to {MOST_BYTES >> 20} MB and {MOST_PIXELS // 10**6} "
    "million pixels; pictures stay on the machine that runs this page, and their files are deleted within minutes."
)
# The page sets this CSS variable when the slider moves; the server is not involved.
OPACITY = "map-opacity"
SET_OPACITY = f"value => {{ document.documentElement.style.setProperty('--{OPACITY}', value); }}"


def path_of(payload: Any) -> str | None:
    """Return the path of an uploaded file."""
    return payload.path if payload else None


def build(models: Models, examples: Sequence[Path]) -> gr.Dropdown:
    """Build the tab inside the current Gradio context; return the choice of the first model."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = gr.Image(
                label="Image", sources=["upload", "webcam", "clipboard"], type="filepath", height=260, buttons=[]
            )
            image.preprocess = path_of  # Gradio's would open files of any format; `uploads` opens them
            gr.Examples([[str(path)] for path in examples], [image], label="Examples (digits for the shipped model)")
            choices = [(shown(models, name), name) for name in models.names]
            first = gr.Dropdown(choices, value=models.first[0], label="Model")
            second = gr.Dropdown([("none", ""), *choices], value=models.first[1] or "", label="Beside it")
            with gr.Row():
                start = gr.Button("Classify", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
            opacity = gr.Slider(0, 1, value=0.5, step=0.05, label="Activation map over the image")
        with gr.Column(scale=2, min_width=280):
            status = gr.Markdown(HINT, elem_id="status")
            offline = gr.Button("Use the shipped digits model, which needs no network", visible=False)
            with gr.Row():
                columns = [part for which in ("first", "second") for part in answer_column(which)]
            with gr.Accordion("The same in Python", open=False):
                code = gr.Code(call_of(models.first[0]), language="python", show_label=False, interactive=False)
    content = gr.State(None)  # the file's bytes, in memory until an hour after the page is closed
    inputs = [content, first, second]
    outputs = [status, offline, code, *columns]

    def classify(content: bytes | None, first: str, second: str) -> Iterator[list[Any]]:
        yield from answers(models, content, [first, second])

    def receive(path: str | None, first: str, second: str) -> Iterator[list[Any]]:
        content, problem = read(path)
        for status, *values in answers(models, content, [first, second]):
            yield [content, problem if content is None else status, *values]

    def use_shipped(content: bytes | None) -> Iterator[list[Any]]:
        for values in answers(models, content, [models.shipped, ""]):
            yield [models.shipped, "", *values]

    # A change during an answer is answered afterwards.
    run: dict[str, Any] = dict(
        concurrency_limit=4,
        trigger_mode="always_last",
        show_progress="minimal",
        show_progress_on=status,
        api_visibility="private",
    )
    started = [image.change(receive, [image, first, second], [content, *outputs], **run)]
    started += [event(classify, inputs, outputs, **run) for event in (start.click, first.input, second.input)]
    started.append(offline.click(use_shipped, content, [first, second, *outputs], **run))
    stop.click(lambda: "Stopped.", None, status, cancels=started, api_visibility="private", queue=False)
    opacity.input(None, opacity, None, js=SET_OPACITY)
    return first


def answer_column(which: str) -> tuple[gr.Label, gr.HTML, gr.Markdown]:
    """Build the column of a model's answer."""
    with gr.Column(min_width=240):
        label = gr.Label(label="Answer", num_top_classes=5, elem_id=f"{which}-classes")
        heat = gr.HTML(elem_id=f"{which}-map")
        note = gr.Markdown(elem_id=f"{which}-note")
    return label, heat, note


def shown(models: Models, name: str) -> str:
    """Return the name of a model as the page shows it."""
    if name == models.shipped:
        return "res2net_tiny.digits (shipped)"
    return f"local-dir:{Path(name).name}" if name.startswith("local-dir:") else name


def read(path: str | None) -> tuple[bytes | None, str]:
    """Read an uploaded image; return its content, or None with the reason."""
    if path is None:
        return None, HINT
    try:
        return read_upload(Path(path)), ""
    except InputError as error:
        return None, str(error)


def answers(models: Models, content: bytes | None, names: Sequence[str]) -> Iterator[list[Any]]:
    """Yield the values of the outputs, each time a model starts or has answered."""
    columns: list[list[Any]] = [[gr.Label(None, label="Answer", visible=bool(name)), "", ""] for name in names]
    problems: list[str] = []
    offer = False
    code = "\n".join(call_of(name) for name in names[:1])
    if content is None:
        yield [gr.skip(), gr.Button(visible=False), code, *(part for column in columns for part in column)]
        return

    def update(status: str) -> list[Any]:
        parts = (part for column in columns for part in column)
        return [" ".join([*problems, status]).strip(), gr.Button(visible=offer), code, *parts]

    for i, name in enumerate(names):
        if not name:
            continue
        yield update(f"Loading {shown(models, name)} ...")
        try:
            classifier = models.load(name)
            answer = classifier.answer(decode_upload(content, classifier.mode))
        except InputError as error:
            offer |= isinstance(error, WeightsUnreachableError)
            problems.append(str(error))
            continue
        title = shown(models, name)
        note = f"{answer.milliseconds:.0f} ms by {answer.backend}"
        columns[i] = [gr.Label(answer.scores, label=title, visible=True), heat_map(answer), note]
    if offer:
        problems.append("The shipped model recognizes digits without a network.")
    yield update("" if problems else "Done.")


def heat_map(answer: Answer) -> str:
    """Return an answer's picture with its activation map above it, as HTML without files on the server."""
    name, score = next(iter(answer.scores.items()))
    picture = encoded(answer.picture)
    colours = colormaps["turbo"](0.1 + 0.75 * answer.heat)  # its ends are too dark on a dark image
    colours[..., 3] = 0.3 + 0.7 * answer.heat  # weak evidence hides less
    heat = encoded(colours)
    style = "width:100%"
    return (
        '<figure style="position:relative;margin:0;max-width:320px">'
        f'<img src="{picture}" style="{style}" alt="input of the model">'
        f'<img src="{heat}" style="{style};position:absolute;inset:0;opacity:var(--{OPACITY},0.5)" '
        f'alt="activation map of {escape(name)}, {score:.0%}"></figure>'
    )


def encoded(pixels: np.ndarray) -> str:
    """Return pixels (H, W, 3 or 4) from 0 to 1 as a data URL, enlarged if they are few."""
    image = Image.fromarray((255 * pixels).astype(np.uint8))
    if min(image.size) < SMALLEST:
        factor = -(-SMALLEST // min(image.size))
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
