"""A drawing of the Res2Net block as SVG, with the colours of the page."""

from res2net_zoo.space.wiring import Wiring

COLUMN = 92  # pixels from one group to the next
LEFT = 64  # centre of the first group
# Heights of the rows, from the input to the output.
INPUT, CONV1, GROUPS, ADD, CONV, OUT, CONV3, SUM = 14, 34, 88, 128, 150, 204, 236, 290

TEXT = 'text-anchor="middle" fill="currentColor" font-size="12"'
LINE = 'fill="none" stroke="currentColor" stroke-width="1.2"'
ARROW = f'{LINE} marker-end="url(#arrow)"'
HEAD = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0,0 L8,4 L0,8 z" fill="currentColor"/></marker></defs>'
)


def text(x: float, y: float, words: str) -> str:
    """Return centred text."""
    return f'<text x="{x}" y="{y}" {TEXT}>{words}</text>'


def box(x: float, y: float, width: float, words: str, colour: str) -> str:
    """Return a box of 24 pixels height, centred at x, with its top at y."""
    fill = f'fill="{colour}" fill-opacity="0.25" stroke="currentColor"'
    rectangle = f'<rect x="{x - width / 2}" y="{y}" width="{width}" height="24" rx="4" {fill}/>'
    return rectangle + text(x, y + 16, words)


def arrow(*points: tuple[float, float]) -> str:
    """Return a line through points, with an arrow at its end."""
    return f'<path d="M{" L".join(f"{x},{y}" for x, y in points)}" {ARROW}/>'


def plus(x: float, y: float) -> str:
    """Return an addition."""
    lines = f'<path d="M{x - 5},{y} h10 M{x},{y - 5} v10" {LINE}/>'
    return f'<circle cx="{x}" cy="{y}" r="9" {LINE}/>{lines}'


def draw(wiring: Wiring) -> str:
    """Draw a block: its groups in the paper's order, x_1 without a convolution on the left."""
    centres = [LEFT + COLUMN * i for i in range(wiring.scale)]
    middle, wide = (centres[0] + centres[-1]) / 2, COLUMN * (wiring.scale - 1) + 84
    side = centres[-1] + 82
    total = wiring.width * wiring.scale
    shortcut = "1x1 projection" if wiring.projection else "identity"
    parts = [
        text(middle, INPUT, f"input: {wiring.in_chs} channels"),
        arrow((middle, INPUT + 5), (middle, CONV1)),
        box(middle, CONV1, wide, f"1x1, {total} channels", "var(--neutral-400)"),
        *(column for i in range(wiring.scale) for column in group(wiring, centres, i)),
        box(middle, CONV3, wide, f"1x1, {wiring.out_chs} channels", "var(--neutral-400)"),
        arrow((middle, CONV3 + 24), (middle, SUM - 9)),
        plus(middle, SUM),
        arrow((middle, SUM + 9), (middle, SUM + 28)),
        text(middle, SUM + 42, f"output: {wiring.out_chs} channels"),
        arrow((middle, INPUT + 9), (side, INPUT + 9), (side, SUM), (middle + 9, SUM)),
        f'<text transform="translate({side + 14},{(INPUT + SUM) / 2}) rotate(-90)" {TEXT}>{shortcut}</text>',
    ]
    width, height = side + 24, SUM + 52
    return (
        f'<div style="overflow-x:auto"><svg role="img" aria-label="{description(wiring)}" '
        f'viewBox="0 0 {width} {height}" style="min-width:{min(width, 64 * wiring.scale + 60)}px;'
        f'max-width:{1.3 * width}px;width:100%;display:block;margin:auto">{HEAD}{"".join(parts)}</svg></div>'
    )


def group(wiring: Wiring, centres: list[int], i: int) -> list[str]:
    """Return the parts of the drawing of group i, from 0, between the two 1x1 convolutions."""
    x, field = centres[i], wiring.fields[i]
    plain = i == 0 and wiring.scale > 1
    adds = wiring.hierarchical and i > 1
    parts = [
        arrow((x, CONV1 + 24), (x, GROUPS - 13)),
        text(x, GROUPS, f"x<tspan baseline-shift='sub' font-size='9'>{i + 1}</tspan>: {wiring.width}"),
    ]
    window = f"3x3{f', /{wiring.stride}' if wiring.stride > 1 else ''}"
    if plain and not wiring.pooled:
        parts.append(arrow((x, GROUPS + 7), (x, OUT - 12)))
    else:
        start = ADD + 9 if adds else GROUPS + 7
        parts.append(arrow((x, start), (x, CONV)))
        groups = f", c={wiring.cardinality}" if wiring.cardinality > 1 and not plain else ""
        colour = "none" if plain else "var(--primary-500)"
        parts.append(box(x, CONV, 76, f"pool {window}" if plain else window + groups, colour))
        parts.append(arrow((x, CONV + 24), (x, OUT - 12)))
    if adds:
        before = centres[i - 1]
        parts.append(arrow((x, GROUPS + 7), (x, ADD - 9)))
        parts.append(plus(x, ADD))
        parts.append(arrow((before, CONV + 33), (x - 46, CONV + 33), (x - 46, ADD), (x - 9, ADD)))
    parts.append(text(x, OUT, f"y<tspan baseline-shift='sub' font-size='9'>{i + 1}</tspan>: {field}x{field}"))
    parts.append(arrow((x, OUT + 6), (x, CONV3)))
    return parts


def description(wiring: Wiring) -> str:
    """Return the drawing in words, for screen readers."""
    groups = f"{wiring.scale} groups of {wiring.width} channels"
    sums = "each is added to the input of the next" if wiring.hierarchical and wiring.scale > 2 else "without additions"
    fields = ", ".join(f"{field}x{field}" for field in wiring.fields)
    return f"A block with {groups}, {sums}; receptive fields of the groups: {fields}"
