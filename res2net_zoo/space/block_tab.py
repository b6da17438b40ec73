"""The tab "Block": a Res2Net by its dimensions, its block as it is wired, and its costs."""

from typing import Any, get_args

import gradio as gr

from res2net_zoo.models.block import Wiring as WiringName
from res2net_zoo.space.drawing import draw
from res2net_zoo.space.wiring import Variant, costs, wiring_of
from res2net_zoo.utils.errors import InputError

FRAMES = [("ImageNet (ResNet)", "imagenet"), ("CIFAR (ResNeXt)", "cifar")]
FIRST = "first of a stage"
NOTE = """\
The 1x1 convolution's output is split into s groups, and (Eq. 1 of the [paper](https://arxiv.org/abs/1904.01169))
y<sub>1</sub> = x<sub>1</sub>, y<sub>2</sub> = K<sub>2</sub>(x<sub>2</sub>),
y<sub>i</sub> = K<sub>i</sub>(x<sub>i</sub> + y<sub>i-1</sub>), where K<sub>i</sub> is a 3x3 convolution. So one block
sees several scales: below each y<sub>i</sub> is its receptive field. A block that halves the resolution lacks
the additions. In memory x<sub>1</sub> is the last group. Drawn is a block of the second stage.
"""


def build() -> None:
    """Build the tab inside the current Gradio context."""
    first = Variant()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            frame = gr.Radio(FRAMES, value=first.frame, label="Model for")
            scale = gr.Slider(1, 8, value=first.scale, step=1, label="Scale s (groups of the hierarchy)")
            width = gr.Slider(2, 128, value=first.width, step=1, label="Width w (channels of a group)")
            cardinality = gr.Slider(1, 32, value=first.cardinality, step=1, label="Cardinality c (groups of a 3x3)")
            depth = gr.Slider(**depths("imagenet"), label="Depth (layers)")
            wiring = gr.Radio(list(get_args(WiringName)), value=first.wiring, label="Wiring")
            block = gr.Radio([FIRST, "any other"], value="any other", label="Block")
        with gr.Column(scale=2, min_width=280):
            numbers = gr.Markdown(figures(first), elem_id="figures")
            drawing = gr.HTML(draw(wiring_of(first, False)), elem_id="drawing")
            gr.Markdown(NOTE)
            with gr.Accordion("The same in Python", open=False):
                code = gr.Code(first.call(), language="python", show_label=False, interactive=False)

    def show(*values: Any) -> tuple[Any, Any, Any]:
        *dimensions, block = values
        variant = Variant(*dimensions)
        try:
            return figures(variant), draw(wiring_of(variant, block == FIRST)), variant.call()
        except InputError as error:
            return f"{error}.", gr.skip(), gr.skip()

    quiet: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
    controls: list[Any] = [frame, depth, cardinality, width, scale, wiring, block]
    frame.input(lambda frame: gr.Slider(**depths(frame)), frame, depth, **quiet)
    changes = [control.change for control in controls]
    gr.on(changes, show, controls, [numbers, drawing, code], trigger_mode="always_last", **quiet)


def depths(frame: str) -> dict[str, int]:
    """Return the range of a frame's depth: 50, 101 and 152 layers, or 9n + 2."""
    if frame == "imagenet":
        return dict(minimum=50, maximum=152, step=51, value=50)
    return dict(minimum=20, maximum=164, step=9, value=29)


def figures(variant: Variant) -> str:
    """Return the costs of a variant in words.

    Raises:
        InputError: No model has these dimensions.
    """
    found = costs(variant)
    return (
        f"**{found.parameters / 1e6:.2f} M** parameters, **{found.macs / 1e9:.2f} GMACs** at "
        f"{found.size} x {found.size}, receptive field **{found.receptive_field:,} pixels**"
    )
