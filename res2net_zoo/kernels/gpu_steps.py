"""Triton kernels of `gpu_network`: convolutions and pooling that read and write channel ranges of NHWC buffers."""

import triton
import triton.language as tl


@triton.jit
def _products(
    src, weight, image, y0, x0, inside, channel, begin, end, blocks, in_h, in_w, chs_in, dilation,
    src_pitch, weight_rows, weight_pitch,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums of products of a tile over some steps, each a tap and a block of input channels."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(begin, end):
        tap = step // blocks
        block = step - tap * blocks
        c = block * BK + tl.arange(0, BK)
        if KH * KW == 1:
            y, x, ok = y0, x0, inside
        else:
            y = y0 + (tap // KW) * dilation
            x = x0 + (tap % KW) * dilation
            ok = inside & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
        place = ((image * in_h + y) * in_w + x).to(tl.int64) * src_pitch
        a = tl.load(src + place[:, None] + c[None, :], mask=ok[:, None] & (c < chs_in)[None, :], other=0.0)
        b = tl.load(weight + (tap * weight_rows + c)[:, None] * weight_pitch + channel[None, :])
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _finish(
    acc, bias, add, dst, dst2, also, pixel, channel, pixels, cut, chs,
    add_pitch, dst_pitch, dst2_pitch, also_pitch,
    RELU: tl.constexpr, HAS_ADD: tl.constexpr, HAS_PARTS: tl.constexpr, HAS_ALSO: tl.constexpr,
):  # fmt: skip
    """Add the bias and the residual to a tile, apply ReLU, and write it."""
    at = pixel.to(tl.int64)[:, None]
    inside = (pixel < pixels)[:, None]
    mask = inside & (channel < chs)[None, :]
    acc += tl.load(bias + channel)[None, :]
    if HAS_ADD:
        acc += tl.load(add + at * add_pitch + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU:
        # Unlike tl.maximum(acc, 0), this keeps NaN, as torch does.
        acc = tl.where(acc < 0.0, 0.0, acc)
    out = acc.to(dst.dtype.element_ty)
    if HAS_PARTS:
        first = inside & (channel < cut)[None, :]
        tl.store(dst + at * dst_pitch + channel[None, :], out, mask=first)
        second = mask & (channel >= cut)[None, :]
        tl.store(dst2 + at * dst2_pitch + (channel - cut)[None, :], out, mask=second)
    else:
        tl.store(dst + at * dst_pitch + channel[None, :], out, mask=mask)
    if HAS_ALSO:
        places = also + at * also_pitch + channel[None, :]
        more = tl.load(places, mask=mask, other=0.0).to(tl.float32) + out.to(tl.float32)
        tl.store(places, more.to(out.dtype), mask=mask)


@triton.jit(
    do_not_specialize=[
        "pixels", "in_h", "in_w", "out_h", "out_w", "chs_in", "chs_out", "cut", "stride", "pad", "dilation",
        "src_pitch", "add_pitch", "dst_pitch", "dst2_pitch", "also_pitch", "weight_rows", "weight_pitch",
    ]
)  # fmt: skip
def convolve(
    src, weight, bias, add, dst, dst2, also, partial, ready,
    pixels, in_h, in_w, out_h, out_w, chs_in, chs_out, cut, stride, pad, dilation,
    src_pitch, add_pitch, dst_pitch, dst2_pitch, also_pitch, weight_rows, weight_pitch,
    KH: tl.constexpr, KW: tl.constexpr, SRC_UNIT: tl.constexpr, DST_UNIT: tl.constexpr,
    RELU: tl.constexpr, HAS_ADD: tl.constexpr, HAS_PARTS: tl.constexpr, HAS_ALSO: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Convolve a channel range of NHWC pixels as an implicit matrix product, see `gpu_network.Convolution`.

    Channel counts and pitches are passed divided by their unit, which makes their alignment known to the compiler.
    """
    chs_in, src_pitch = chs_in * SRC_UNIT, src_pitch * SRC_UNIT
    weight_rows, weight_pitch = weight_rows * 16, weight_pitch * 16
    chs_out, cut = chs_out * DST_UNIT, cut * DST_UNIT
    add_pitch, dst_pitch, dst2_pitch = add_pitch * DST_UNIT, dst_pitch * DST_UNIT, dst2_pitch * DST_UNIT
    also_pitch = also_pitch * DST_UNIT
    tiles_n = tl.cdiv(chs_out, BN)
    tile = tl.program_id(0)
    pixel = (tile // tiles_n) * BM + tl.arange(0, BM)
    channel = (tile % tiles_n) * BN + tl.arange(0, BN)
    image = pixel // (out_h * out_w)
    rest = pixel % (out_h * out_w)
    y0 = (rest // out_w) * stride - pad
    x0 = (rest % out_w) * stride - pad
    inside = pixel < pixels
    blocks = tl.cdiv(chs_in, BK)
    steps = KH * KW * blocks
    begin, end = 0, steps
    if SHARED:
        each = tl.cdiv(steps, tl.num_programs(1))
        begin = tl.program_id(1) * each
        end = tl.minimum(begin + each, steps)
    acc = _products(
        src, weight, image, y0, x0, inside, channel, begin, end, blocks, in_h, in_w, chs_in, dilation,
        src_pitch, weight_rows, weight_pitch, KH, KW, BM, BN, BK,
    )  # fmt: skip
    if not SHARED:
        _finish(
            acc, bias, add, dst, dst2, also, pixel, channel, pixels, cut, chs_out,
            add_pitch, dst_pitch, dst2_pitch, also_pitch, RELU, HAS_ADD, HAS_PARTS, HAS_ALSO,
        )  # fmt: skip
    else:
        # The program that finishes a tile last adds up the partial sums of all.
        inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        programs = tl.num_programs(1)
        places = partial + tile * programs * (BM * BN) + inner
        tl.store(places + tl.program_id(1) * (BM * BN), acc)
        tl.debug_barrier()
        if tl.atomic_add(ready + tile, 1) == programs - 1:
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for part in range(programs):
                acc += tl.load(places + part * (BM * BN), cache_modifier=".cg")
            tl.store(ready + tile, 0)
            _finish(
                acc, bias, add, dst, dst2, also, pixel, channel, pixels, cut, chs_out,
                add_pitch, dst_pitch, dst2_pitch, also_pitch, RELU, HAS_ADD, HAS_PARTS, HAS_ALSO,
            )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "in_h", "in_w", "out_h", "out_w", "chs", "src_pitch", "dst_pitch"])
def pool(
    src, dst, pixels, in_h, in_w, out_h, out_w, chs, src_pitch, dst_pitch,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    MAX: tl.constexpr, COUNT_PAD: tl.constexpr, UNIT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Pool a channel range of NHWC pixels by the maximum or the mean of a window."""
    chs, src_pitch, dst_pitch = chs * UNIT, src_pitch * UNIT, dst_pitch * UNIT
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    image = pixel // (out_h * out_w)
    rest = pixel % (out_h * out_w)
    y0 = (rest // out_w) * SH - PH
    x0 = (rest % out_w) * SW - PW
    inside = pixel < pixels
    known = (channel < chs)[None, :]
    empty: tl.constexpr = float("-inf") if MAX else 0.0
    acc = tl.full((BP, BC), empty, dtype=tl.float32)
    count = tl.zeros((BP,), dtype=tl.float32)
    for tap in tl.static_range(KH * KW):
        y = y0 + tap // KW
        x = x0 + tap % KW
        ok = inside & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
        place = ((image * in_h + y) * in_w + x).to(tl.int64) * src_pitch
        value = tl.load(src + place[:, None] + channel[None, :], mask=ok[:, None] & known, other=empty).to(tl.float32)
        if MAX:
            acc = tl.where((acc >= value) | (acc != acc), acc, value)
        else:
            acc += value
            count += ok.to(tl.float32)
    if not MAX:
        acc = acc / (KH * KW) if COUNT_PAD else acc / tl.maximum(count, 1.0)[:, None]
    places = dst + pixel.to(tl.int64)[:, None] * dst_pitch + channel[None, :]
    tl.store(places, acc.to(dst.dtype.element_ty), mask=inside[:, None] & known)


@triton.jit
def load_images(
    src, dst, pixels, height, width, src_image, src_channel, src_row, src_pixel, dst_image, dst_row,
    CHS: tl.constexpr, ROOM: tl.constexpr, BORDER: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Copy images of any strides into NHWC pixels of `ROOM` channels inside a border, and convert their type."""
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    channel = tl.arange(0, ROOM)
    row = pixel // width
    image, y, x = (row // height).to(tl.int64), row % height, pixel % width
    inside = (pixel < pixels)[:, None] & (channel < CHS)[None, :]
    places = src + (image * src_image + y * src_row + x * src_pixel)[:, None] + (channel * src_channel)[None, :]
    value = tl.load(places, mask=inside, other=0.0)
    places = dst + (image * dst_image + (y + BORDER) * dst_row + (x + BORDER) * ROOM)[:, None] + channel[None, :]
    tl.store(places, value.to(dst.dtype.element_ty), mask=(pixel < pixels)[:, None])
