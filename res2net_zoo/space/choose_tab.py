"""The tab "Choose": the catalogue as a plot and a table, and the card of a model."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from res2net_zoo.space.catalogue import (
    AXES,
    ORDERS,
    SPEED,
    TOP1,
    call,
    card,
    matching,
    measure,
    names,
    ordered,
    points,
    table,
)
from res2net_zoo.space.models import Models

NOTE = (
    "Accuracy is the published top-1 on ImageNet-1k in percent. \\* The licence of the release's code; it states none "
    "for the weights. Click a row for the model's card; the menu of a column sorts and filters, too."
)
WIDTHS = (260, 75, 75, 105, 80, 90, 75, 170, 240)  # pixels of the table's columns


def build(models: Models) -> tuple[gr.Button, gr.Dropdown]:
    """Build the tab inside the current Gradio context; return the button to try the chosen model, and the choice."""
    frame = table({})
    most = float(frame["params (M)"].max()) + 1
    with gr.Row():
        words = gr.Textbox(label="Filter by name, licence or publisher", placeholder="res2net50 apache", min_width=240)
        parameters = gr.Slider(1, most, value=most, step=1, label="At most (M parameters)", min_width=200)
        top1 = gr.Slider(0, 86, value=0, step=1, label="At least (top-1)", min_width=200)
    with gr.Row():
        axis = gr.Radio(AXES, value=AXES[0], label="Accuracy over", scale=3, min_width=280)
        order = gr.Dropdown(ORDERS, value=ORDERS[0], label="Sort by", scale=2, min_width=160)
        start = gr.Button("Measure images/s here", scale=1, min_width=160)
        stop = gr.Button("Stop", scale=1, min_width=80)
    plot = gr.ScatterPlot(
        points(frame, AXES[0]), x=AXES[0], y=TOP1, color="licence", tooltip="all", height=340, y_lim=[70, 86]
    )
    status = gr.Markdown(NOTE)
    shown = gr.Dataframe(
        ordered(frame, ORDERS[0]), interactive=False, max_height=420, column_widths=[*WIDTHS], elem_id="catalogue"
    )
    name = gr.Dropdown(names(), value=names()[0], label="Model", elem_id="chosen")
    try_it = gr.Button("Try this model")
    code = gr.Code(call(names()[0]), language="python", label="Call", interactive=False)
    text = gr.Markdown(card(names()[0]), elem_id="card")
    speeds = gr.State({})

    def measured(
        speeds: dict[str, float],
        words: str,
        parameters: float,
        top1: float,
        order: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio's way to ask for one
    ) -> Iterator[tuple[Any, ...]]:
        speeds = dict(speeds)
        rows = matching(table(speeds), words, parameters, top1)
        wanted = list(dict.fromkeys(architecture_of(row) for row in rows["model"]))
        progress((0, len(wanted)), desc="measuring", unit="models")
        for i, (architecture, speed) in enumerate(measure(models, wanted), 1):
            speeds[architecture] = speed
            progress((i, len(wanted)), desc=architecture, unit="models")
            shown = show(speeds, words, parameters, top1, SPEED, order)
            yield speeds, *shown, SPEED, f"{i} of {len(wanted)} models measured."

    filters: list[Any] = [speeds, words, parameters, top1]
    quiet: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
    changes = [control.change for control in (words, parameters, top1, axis, order)]
    gr.on(changes, show, [*filters, axis, order], [plot, shown], trigger_mode="always_last", **quiet)
    run = start.click(
        measured,
        [*filters, order],
        [speeds, plot, shown, axis, status],
        show_progress_on=status,
        api_visibility="private",
    )
    stop.click(lambda: "Stopped.", None, status, cancels=[run], api_visibility="private", queue=False)
    shown.select(selected, None, name, **quiet)
    name.change(lambda name: (call(name), card(name)), name, [code, text], trigger_mode="always_last", **quiet)
    return try_it, name


def show(
    speeds: dict[str, float], words: str, parameters: float, top1: float, axis: str, order: str
) -> tuple[Any, Any]:
    """Return the plot and the table of the rows that pass the filters."""
    rows = ordered(matching(table(speeds), words, parameters, top1), order)
    return gr.ScatterPlot(points(rows, axis), x=axis, x_title=axis), rows


def selected(event: gr.SelectData) -> str:
    """Return the model of the row that a user has clicked."""
    return event.row_value[0]


def architecture_of(name: str) -> str:
    """Return the architecture of a model in the table."""
    return name.partition(".")[0]
