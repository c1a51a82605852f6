"""The long convolution where a block does not fit on chip: transforms of n = n1 n2 points in three passes.

Point t = t1 n2 + t2. Down the columns (over t1, BE channels of one t2 to a program) and times the turns between, along
the rows (over t2: transform, product, and back, in place), and up the columns again. In between lie complex numbers
(2, rows, n1, n2, e): memory is crossed twice on the way there and back. Spectra are (2, n1, n2, e), in the order in
which the transforms leave them, times 1/n. The shape of a block, and HALF, as in `hopper_kernels`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longwave.ops.fft_conv.hopper_kernels import load_tokens, take_real, twist
from longwave.ops.gluon_fft import first, flat_layout, forward, frequency, inverse, last
from longwave.ops.triton_math import cos_sin

_cos_sin = gluon.jit(cos_sin.fn)


@gluon.jit
def _turn_between(
    re, im, t2, SIGN: gl.constexpr, RADICES: gl.constexpr, N1: gl.constexpr, N: gl.constexpr, BE: gl.constexpr,
    VEC: gl.constexpr,
):  # fmt: skip
    """Times exp(SIGN 2 pi i t2 (1 - 4 k1) / 4n), and its conjugate: of column t2, the twist and the turn of row k1."""
    LAST: gl.constexpr = last(RADICES)
    place = gl.arange(0, N1 // LAST * BE, layout=flat_layout(VEC, gl.num_warps())) // BE
    turned_re, turned_im = (), ()
    for r in gl.static_range(LAST):
        part = t2 * (1 - 4 * frequency(place, r, RADICES)) & (4 * N - 1)
        quarter = (part + N // 2) // N
        c, _, s = _cos_sin(quarter, (part - quarter * N).to(gl.float32) * (1.0 / N))
        s = s * SIGN
        turned_re, turned_im = turned_re + (re[r] * c - im[r] * s,), turned_im + (re[r] * s + im[r] * c,)
    return turned_re, turned_im


@gluon.jit
def columns_kernel(
    x, history, lengths, out, final, table, plane,
    rows, l, e, n2, start, low, high, held, keep, stride_xb, stride_xt, stride_xe, stride_hb, stride_ht, stride_plane,
    HALF: gl.constexpr, HISTORY: gl.constexpr, FINAL: gl.constexpr, LENGTHS: gl.constexpr,
    RADICES: gl.constexpr, N1: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Point 0 is time `start`; inputs count from time `low` until `high`, or until `lengths`."""
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N1 // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    c_blocks = gl.cdiv(e, BE)
    program = gl.program_id(0).to(gl.int64)
    c0 = (program % c_blocks).to(gl.int32) * BE
    t2 = (program // c_blocks % n2).to(gl.int32)
    row = program // c_blocks // n2
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    here = c < e
    time = start + t2 + i // BE * n2
    stop = high
    if LENGTHS:
        stop = gl.minimum(stop, gl.load(lengths + row).to(gl.int32))
    x += row * stride_xb + c.to(gl.int64) * stride_xe
    history += row * stride_hb + c
    parts = ()
    for r in gl.static_range(R if HALF else 2 * R):
        t = time + r * SIZE * n2
        value = load_tokens(x, history, stride_xt, stride_ht, t, low, stop, held, here, HISTORY)
        if FINAL:
            at = t - (l - keep)
            mask = here & (at >= 0) & (at < keep) & (t < stop)
            gl.store(final + (row * keep + at) * e + c, value.to(final.dtype.element_ty), mask=mask)
        parts = parts + (value,)
    re, im = twist(parts[:R], parts[R:], HALF, R)
    re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    re, im = _turn_between(re, im, t2, 1, RADICES, N1, N, BE, VEC)
    j = gl.arange(0, N1 // LAST * BE, layout=layout)
    c = c0 + j % BE
    step = n2.to(gl.int64) * e
    out += row * N1 * step + (j // BE * LAST) * step + t2 * e + c
    for r in gl.static_range(LAST):
        gl.store(out + r * step, re[r], mask=c < e)
        gl.store(out + r * step + stride_plane, im[r], mask=c < e)


@gluon.jit
def columns_back_kernel(
    given, y, dfinal, lengths, table, plane,
    rows, e, n2, start, low, high, y_begin, y_length, keep, stride_plane, stride_yb, stride_yt, stride_ye,
    HALF: gl.constexpr, DFINAL: gl.constexpr, LENGTHS: gl.constexpr,
    RADICES: gl.constexpr, N1: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Point 0 is time `start`; results are stored from time `low` until `high`."""
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N1 // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    c_blocks = gl.cdiv(e, BE)
    program = gl.program_id(0).to(gl.int64)
    c0 = (program % c_blocks).to(gl.int32) * BE
    t2 = (program // c_blocks % n2).to(gl.int32)
    row = program // c_blocks // n2
    j = gl.arange(0, N1 // LAST * BE, layout=layout)
    c = c0 + j % BE
    step = n2.to(gl.int64) * e
    given += row * N1 * step + (j // BE * LAST) * step + t2 * e + c
    re, im = (), ()
    for r in gl.static_range(LAST):
        re = re + (gl.load(given + r * step, mask=c < e, other=0.0, cache_modifier=".cg"),)
        im = im + (gl.load(given + r * step + stride_plane, mask=c < e, other=0.0, cache_modifier=".cg"),)
    re, im = _turn_between(re, im, t2, -1, RADICES, N1, N, BE, VEC)
    re, im = inverse(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    end = y_begin + y_length
    stop = end
    if LENGTHS:
        stop = gl.load(lengths + row).to(gl.int32)
    y += row * stride_yb + c.to(gl.int64) * stride_ye
    values = take_real(re, im, HALF, R)
    for r in gl.static_range(R if HALF else 2 * R):
        t = start + t2 + (i // BE + r * SIZE) * n2
        here = (c < e) & (t >= low) & (t < high)
        value = values[r]
        if LENGTHS:
            value = gl.where(t < stop, value, 0.0)
        if DFINAL:
            at = t - (end - keep)
            value += gl.load(dfinal + (row * keep + at) * e + c, mask=here & (at >= 0), other=0.0).to(gl.float32)
        gl.store(y + (t - y_begin).to(gl.int64) * stride_yt, value.to(y.dtype.element_ty), mask=here)


@gluon.jit
def _load_row(at, step, here, R: gl.constexpr, SIZE: gl.constexpr, stride_plane):
    re, im = (), ()
    for r in gl.static_range(R):
        re = re + (gl.load(at + r * SIZE * step, mask=here, other=0.0, cache_modifier=".cg"),)
        im = im + (gl.load(at + r * SIZE * step + stride_plane, mask=here, other=0.0, cache_modifier=".cg"),)
    return re, im


@gluon.jit
def rows_kernel(
    z, h, D, table, plane, rows, e, n1, stride_plane, stride_hplane, scale,
    SPECTRUM: gl.constexpr, CONJ: gl.constexpr, SKIP: gl.constexpr,
    RADICES: gl.constexpr, N2: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """In place, or with SPECTRUM only the transform, into h."""
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N2 // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    program = gl.program_id(0).to(gl.int64)
    row = program % rows
    c_blocks = gl.cdiv(e, BE)
    c0 = (program // rows % c_blocks).to(gl.int32) * BE
    k1 = program // rows // c_blocks
    i = gl.arange(0, SIZE * BE, layout=layout)
    z += (row * n1 + k1) * N2 * e
    at = z + (i // BE) * e + c0 + i % BE
    re, im = _load_row(at, e, c0 + i % BE < e, R, SIZE, stride_plane)
    re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    j = gl.arange(0, N2 // LAST * BE, layout=layout)
    c = c0 + j % BE
    h += k1 * N2 * e + (j // BE * LAST) * e + c
    if SPECTRUM:
        for r in gl.static_range(LAST):
            gl.store(h + r * e, re[r] * scale, mask=c < e)
            gl.store(h + r * e + stride_hplane, im[r] * scale, mask=c < e)
    else:
        skip = gl.zeros([N2 // LAST * BE], gl.float32, layout)
        if SKIP:
            skip = gl.load(D + c, mask=c < e, other=0.0).to(gl.float32) * scale
        product_re, product_im = (), ()
        for r in gl.static_range(LAST):
            h_re = gl.load(h + r * e, mask=c < e, other=0.0, cache_modifier=".cg") + skip
            h_im = gl.load(h + r * e + stride_hplane, mask=c < e, other=0.0, cache_modifier=".cg")
            if CONJ:
                h_im = -h_im
            product_re = product_re + (re[r] * h_re - im[r] * h_im,)
            product_im = product_im + (re[r] * h_im + im[r] * h_re,)
        re, im = inverse(product_re, product_im, table, plane, RADICES, 1, SIZE, BE, VEC)
        for r in gl.static_range(R):
            gl.store(at + r * SIZE * e, re[r], mask=c0 + i % BE < e)
            gl.store(at + r * SIZE * e + stride_plane, im[r], mask=c0 + i % BE < e)


@gluon.jit
def rows_correlate_kernel(
    z, up, total, table, plane, rows, e, n1, stride_plane, stride_tplane, scale,
    MORE: gl.constexpr, RADICES: gl.constexpr, N2: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """total (2, n1, n2, e) = the sum over rows of conj(z) up; with MORE on top of what it holds."""
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N2 // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    c_blocks = gl.cdiv(e, BE)
    program = gl.program_id(0).to(gl.int64)
    c0 = (program % c_blocks).to(gl.int32) * BE
    k1 = program // c_blocks
    i = gl.arange(0, SIZE * BE, layout=layout)
    here = c0 + i % BE < e
    at = k1 * N2 * e + (i // BE) * e + c0 + i % BE
    j = gl.arange(0, N2 // LAST * BE, layout=layout)
    c = c0 + j % BE
    total += k1 * N2 * e + (j // BE * LAST) * e + c
    per_row = n1.to(gl.int64) * N2 * e
    for row in range(rows):
        re, im = _load_row(z + at, e, here, R, SIZE, stride_plane)
        re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
        up_re, up_im = _load_row(up + at, e, here, R, SIZE, stride_plane)
        up_re, up_im = forward(up_re, up_im, table, plane, RADICES, 1, SIZE, BE, VEC)
        mask = c < e
        if not MORE:
            mask = mask & (row > 0)
        for r in gl.static_range(LAST):
            sum_re = gl.load(total + r * e, mask=mask, other=0.0, cache_modifier=".cg")
            sum_im = gl.load(total + r * e + stride_tplane, mask=mask, other=0.0, cache_modifier=".cg")
            sum_re += (re[r] * up_re[r] + im[r] * up_im[r]) * scale
            sum_im += (re[r] * up_im[r] - im[r] * up_re[r]) * scale
            gl.store(total + r * e, sum_re, mask=c < e)
            gl.store(total + r * e + stride_tplane, sum_im, mask=c < e)
        at += per_row


@gluon.jit
def rows_back_kernel(
    z, table, plane, e, stride_plane,
    RADICES: gl.constexpr, N2: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """The inverse alone, in place."""
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N2 // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    c_blocks = gl.cdiv(e, BE)
    program = gl.program_id(0).to(gl.int64)
    c0 = (program % c_blocks).to(gl.int32) * BE
    z += program // c_blocks * N2 * e
    j = gl.arange(0, N2 // LAST * BE, layout=layout)
    c = c0 + j % BE
    re, im = _load_row(z + (j // BE * LAST) * e + c, e, c < e, LAST, 1, stride_plane)
    re, im = inverse(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    z += (i // BE) * e + c
    gl.thread_barrier()
    for r in gl.static_range(R):
        gl.store(z + r * SIZE * e, re[r], mask=c < e)
        gl.store(z + r * SIZE * e + stride_plane, im[r], mask=c < e)
