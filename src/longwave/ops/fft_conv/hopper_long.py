"""The long convolution where a block does not fit on chip: transforms of n = n1 n2 points in three passes.

Point t = t1 n2 + t2. Down the columns (over t1, BE channels of one t2 to a program) and times the turns between, along
the rows (over t2: transform, product, and back, in place), and up the columns again. In between lie complex numbers
(2, n1, n2, channels). Spectra are (2, n1, n2, e), in the order in which the transforms leave them, times 1/n. The shape
of a block, and HALF, as in `hopper_kernels`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longwave.ops.fft_conv.hopper_kernels import load_tokens, take_real, twist
from longwave.ops.gluon_fft import first, flat_layout, forward, frequency, index_layout, inverse, last
from longwave.ops.triton_math import cos_sin

_cos_sin = gluon.jit(cos_sin.fn)


@gluon.jit
def _turn_between(
    re, im, t2, n2, table, plane, SIGN: gl.constexpr, RADICES: gl.constexpr, N1: gl.constexpr, N: gl.constexpr,
    BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Times exp(SIGN 2 pi i t2 (1 - 4 k1) / 4n): of column t2, the twist, and the turn of row k1.

    Row k1 = k0 + r n1 / LAST: k0's part is computed, that of r comes from the table's end.
    """
    LAST: gl.constexpr = last(RADICES)
    PLACES: gl.constexpr = N1 // LAST
    flat: gl.constexpr = flat_layout(VEC, gl.num_warps())
    indices: gl.constexpr = index_layout([PLACES, BE], VEC, gl.num_warps())
    place = gl.arange(0, PLACES, layout=gl.SliceLayout(1, indices))
    part = t2 * (1 - 4 * frequency(place, 0, RADICES)) & (4 * N - 1)
    quarter = (part + N // 2) // N
    c0, _, s0 = _cos_sin(quarter, (part - quarter * N).to(gl.float32) * (1.0 / N))
    table += plane - n2 * LAST
    turned_re, turned_im = (), ()
    for r in gl.static_range(LAST):
        c_r, s_r = gl.load(table + t2 * r), gl.load(table + t2 * r + plane)
        c, s = (c0 * c_r - s0 * s_r)[:, None], (SIGN * (c0 * s_r + s0 * c_r))[:, None]
        u = gl.convert_layout(re[r].reshape([PLACES, BE]), indices, assert_trivial=True)
        v = gl.convert_layout(im[r].reshape([PLACES, BE]), indices, assert_trivial=True)
        p, q = (u * c - v * s).reshape([PLACES * BE]), (u * s + v * c).reshape([PLACES * BE])
        turned_re = turned_re + (gl.convert_layout(p, flat, assert_trivial=True),)
        turned_im = turned_im + (gl.convert_layout(q, flat, assert_trivial=True),)
    return turned_re, turned_im


@gluon.jit
def _down(
    x, history, z, final, table, plane, c0, t2, l, e, n2, start, low, stop, held, keep, stride_xt, stride_xe, stride_ht,
    step, stride_plane,
    HALF: gl.constexpr, HISTORY: gl.constexpr, FINAL: gl.constexpr,
    RADICES: gl.constexpr, N1: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Column t2 of channels from c0 on, from a row's x to z, which points to its first number, `step` before the next.

    Point 0 is time `start`; inputs count from time `low` until `stop`.
    """
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N1 // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    here = c < e
    time = start + t2 + i // BE * n2
    x += c.to(gl.int64) * stride_xe
    history += c
    parts = ()
    for r in gl.static_range(R if HALF else 2 * R):
        t = time + r * SIZE * n2
        value = load_tokens(x, history, stride_xt, stride_ht, t, low, stop, held, here, HISTORY)
        if FINAL:
            at = t - (l - keep)
            mask = here & (at >= 0) & (at < keep) & (t < stop)
            gl.store(final + at.to(gl.int64) * e + c, value.to(final.dtype.element_ty), mask=mask)
        parts = parts + (value,)
    re, im = twist(parts[:R], parts[R:], HALF, R)
    re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    re, im = _turn_between(re, im, t2, n2, table, plane, 1, RADICES, N1, N, BE, VEC)
    j = gl.arange(0, N1 // LAST * BE, layout=layout)
    z += (j // BE * LAST) * step + j % BE
    for r in gl.static_range(LAST):
        gl.store(z + r * step, re[r], mask=c0 + j % BE < e)
        gl.store(z + r * step + stride_plane, im[r], mask=c0 + j % BE < e)


@gluon.jit
def _up(
    z, y, dfinal, table, plane, c0, t2, e, n2, start, low, high, stop, end, keep, stride_yt, stride_ye,
    step, stride_plane,
    HALF: gl.constexpr, DFINAL: gl.constexpr, LENGTHS: gl.constexpr,
    RADICES: gl.constexpr, N1: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Column t2 on its way back to a row's y, which points to time 0; it gets the times from `low` until `high`.

    Zeros from `stop` on; `dfinal` is added to the last ones before `end`.
    """
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N1 // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    j = gl.arange(0, N1 // LAST * BE, layout=layout)
    z += (j // BE * LAST) * step + j % BE
    re, im = _load_tuple(z, step, c0 + j % BE < e, LAST, stride_plane)
    re, im = _turn_between(re, im, t2, n2, table, plane, -1, RADICES, N1, N, BE, VEC)
    re, im = inverse(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    y += c.to(gl.int64) * stride_ye
    values = take_real(re, im, HALF, R)
    for r in gl.static_range(R if HALF else 2 * R):
        t = start + t2 + (i // BE + r * SIZE) * n2
        here = (c < e) & (t >= low) & (t < high)
        value = values[r]
        if LENGTHS:
            value = gl.where(t < stop, value, 0.0)
        if DFINAL:
            at = t - (end - keep)
            value += gl.load(dfinal + at.to(gl.int64) * e + c, mask=here & (at >= 0), other=0.0).to(gl.float32)
        gl.store(y + t.to(gl.int64) * stride_yt, value.to(y.dtype.element_ty), mask=here)


@gluon.jit
def _load_tuple(at, step, here, R: gl.constexpr, stride_plane):
    re, im = (), ()
    for r in gl.static_range(R):
        re = re + (gl.load(at + r * step, mask=here, other=0.0, cache_modifier=".cg"),)
        im = im + (gl.load(at + r * step + stride_plane, mask=here, other=0.0, cache_modifier=".cg"),)
    return re, im


@gluon.jit
def _along(
    z, h, D, table, plane, c0, e, step, stride_plane, stride_hplane, scale,
    SPECTRUM: gl.constexpr, CONJ: gl.constexpr, SKIP: gl.constexpr,
    RADICES: gl.constexpr, N2: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """A row of channels from c0 on, times h, in place; with SPECTRUM only the transform, into h.

    z and h point to the row's first numbers, `step` and e before the next.
    """
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N2 // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    i = gl.arange(0, SIZE * BE, layout=layout)
    z += (i // BE) * step + i % BE
    re, im = _load_tuple(z, SIZE * step, c0 + i % BE < e, R, stride_plane)
    re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    j = gl.arange(0, N2 // LAST * BE, layout=layout)
    mask = c0 + j % BE < e
    h += (j // BE * LAST) * e + j % BE
    if SPECTRUM:
        for r in gl.static_range(LAST):
            gl.store(h + r * e, re[r] * scale, mask=mask)
            gl.store(h + r * e + stride_hplane, im[r] * scale, mask=mask)
    else:
        skip = gl.zeros([N2 // LAST * BE], gl.float32, layout)
        if SKIP:
            skip = gl.load(D + c0 + j % BE, mask=mask, other=0.0).to(gl.float32) * scale
        product_re, product_im = (), ()
        for r in gl.static_range(LAST):
            h_re = gl.load(h + r * e, mask=mask, other=0.0, cache_modifier=".cg") + skip
            h_im = gl.load(h + r * e + stride_hplane, mask=mask, other=0.0, cache_modifier=".cg")
            if CONJ:
                h_im = -h_im
            product_re = product_re + (re[r] * h_re - im[r] * h_im,)
            product_im = product_im + (re[r] * h_im + im[r] * h_re,)
        re, im = inverse(product_re, product_im, table, plane, RADICES, 1, SIZE, BE, VEC)
        for r in gl.static_range(R):
            gl.store(z + r * SIZE * step, re[r], mask=c0 + i % BE < e)
            gl.store(z + r * SIZE * step + stride_plane, im[r], mask=c0 + i % BE < e)


@gluon.jit
def _wait_for(counter, target):
    seen = gl.atomic_add(counter, 0, sem="acquire")
    while seen < target:
        seen = gl.atomic_add(counter, 0, sem="acquire")


@gluon.jit
def _count_up(counter):
    gl.thread_barrier()
    gl.atomic_add(counter, 1, sem="release")


@gluon.jit
def passes_kernel(
    x, history, lengths, h, D, y, edge, z, counters, table, plane, table2, plane2,
    rows, l, e, chunks, start, low, high, held, keep, y_low, y_high, y_begin, y_length,
    stride_xb, stride_xt, stride_hb, stride_ht, stride_hplane, scale,
    CONJ: gl.constexpr, HALF: gl.constexpr, HISTORY: gl.constexpr, FINAL: gl.constexpr, DFINAL: gl.constexpr,
    LENGTHS: gl.constexpr, SKIP: gl.constexpr, PASS: gl.constexpr, SLOTS: gl.constexpr, LAG: gl.constexpr,
    BLOCKS: gl.constexpr, RADICES: gl.constexpr, RADICES2: gl.constexpr, N1: gl.constexpr, N2: gl.constexpr,
    BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """One pass over all chunks (PASS 0 down, 1 along, 2 up), a chunk being BLOCKS BE channels of a row; or all of them.

    All (PASS 3): chunks are so small that they stay in the second cache, and take turns in SLOTS places in z. The
    programs of a step go down in chunk `step`, along in the chunk LAG before it, up in the one before that, and so
    wait, if at all, for programs that were started earlier.
    """
    COLUMNS: gl.constexpr = N2 * BLOCKS
    ROWS: gl.constexpr = N1 * BLOCKS
    N: gl.constexpr = N1 * N2
    PLANE: gl.constexpr = N * BLOCKS * BE
    STEP: gl.constexpr = N2 * BLOCKS * BE
    if PASS == 3:
        step = gl.program_id(0) // (2 * COLUMNS + ROWS)
        item = gl.program_id(0) % (2 * COLUMNS + ROWS)
        along, up = item >= COLUMNS, item >= COLUMNS + ROWS
        item = item - gl.where(up, COLUMNS + ROWS, gl.where(along, COLUMNS, 0))
        chunk = step - gl.where(up, 2 * LAG, gl.where(along, LAG, 0))
    else:
        along: gl.constexpr = PASS == 1
        up: gl.constexpr = PASS == 2
        chunk = gl.program_id(0) // (ROWS if along else COLUMNS)
        item = gl.program_id(0) % (ROWS if along else COLUMNS)
    if (chunk >= 0) & (chunk < chunks):
        row = (chunk % rows).to(gl.int64)
        c_z = item % BLOCKS * BE
        c0 = chunk // rows * (BLOCKS * BE) + c_z
        index = item // BLOCKS
        slot = chunk % SLOTS if PASS == 3 else chunk
        z += slot.to(gl.int64) * (2 * PLANE) + c_z
        arrived = counters + chunk
        if up:
            if PASS == 3:
                _wait_for(arrived + chunks, ROWS)
            end = y_begin + y_length
            stop = end
            if LENGTHS:
                stop = gl.load(lengths + row).to(gl.int32)
            _up(
                z + index * (BLOCKS * BE), y + (row * y_length - y_begin) * e, edge + row * keep * e, table, plane,
                c0, index, e, N2, start, y_low, y_high, stop, end, keep, e, 1, STEP, PLANE,
                HALF, DFINAL, LENGTHS, RADICES, N1, N, BE, VEC,
            )  # fmt: skip
            if PASS == 3:
                _count_up(arrived + 2 * chunks)
        elif along:
            if PASS == 3:
                _wait_for(arrived, COLUMNS)
            _along(
                z + index * STEP, h + (index.to(gl.int64) * N2 * e + c0), D, table2, plane2, c0, e, BLOCKS * BE, PLANE,
                stride_hplane, scale, False, CONJ, SKIP, RADICES2, N2, BE, VEC,
            )  # fmt: skip
            if PASS == 3:
                _count_up(arrived + chunks)
        else:
            if PASS == 3:
                if chunk >= SLOTS:
                    _wait_for(arrived + (2 * chunks - SLOTS), COLUMNS)
            stop = high
            if LENGTHS:
                stop = gl.minimum(stop, gl.load(lengths + row).to(gl.int32))
            _down(
                x + row * stride_xb, history + row * stride_hb, z + index * (BLOCKS * BE), edge + row * keep * e,
                table, plane, c0, index, l, e, N2, start, low, stop, held, keep, stride_xt, 1, stride_ht, STEP, PLANE,
                HALF, HISTORY, FINAL, RADICES, N1, N, BE, VEC,
            )  # fmt: skip
            if PASS == 3:
                _count_up(arrived)


@gluon.jit
def columns_kernel(
    x, history, lengths, z, table, plane,
    l, e, n2, start, low, high, held, stride_xb, stride_xt, stride_xe, stride_hb, stride_ht, stride_plane,
    HALF: gl.constexpr, HISTORY: gl.constexpr, LENGTHS: gl.constexpr,
    RADICES: gl.constexpr, N1: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """z (2, rows, n1, n2, e)."""
    c_blocks = gl.cdiv(e, BE)
    program = gl.program_id(0).to(gl.int64)
    c0 = (program % c_blocks).to(gl.int32) * BE
    t2 = (program // c_blocks % n2).to(gl.int32)
    row = program // c_blocks // n2
    stop = high
    if LENGTHS:
        stop = gl.minimum(stop, gl.load(lengths + row).to(gl.int32))
    step = n2.to(gl.int64) * e
    _down(
        x + row * stride_xb, history + row * stride_hb, z + (row * N1 * step + t2 * e + c0), x, table, plane,
        c0, t2, l, e, n2, start, low, stop, held, 0, stride_xt, stride_xe, stride_ht, step, stride_plane,
        HALF, HISTORY, False, RADICES, N1, N, BE, VEC,
    )  # fmt: skip


@gluon.jit
def columns_back_kernel(
    z, y, table, plane, e, n2, taps, stride_plane,
    HALF: gl.constexpr,
    RADICES: gl.constexpr, N1: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """y (taps, e)."""
    c_blocks = gl.cdiv(e, BE)
    c0 = gl.program_id(0) % c_blocks * BE
    t2 = gl.program_id(0) // c_blocks
    _up(
        z + (t2.to(gl.int64) * e + c0), y, y, table, plane, c0, t2, e, n2, 0, 0, taps, taps, taps, 0, e, 1,
        n2.to(gl.int64) * e, stride_plane, HALF, False, False, RADICES, N1, N, BE, VEC,
    )  # fmt: skip


@gluon.jit
def rows_kernel(
    z, h, table, plane, e, stride_plane, scale,
    RADICES: gl.constexpr, N2: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """The rows' transforms, from z (2, n1, n2, e) to h likewise."""
    c_blocks = gl.cdiv(e, BE)
    program = gl.program_id(0).to(gl.int64)
    c0 = (program % c_blocks).to(gl.int32) * BE
    first_number = program // c_blocks * N2 * e + c0
    _along(
        z + first_number, h + first_number, h, table, plane, c0, e, e, stride_plane, stride_plane, scale,
        True, False, False, RADICES, N2, BE, VEC,
    )  # fmt: skip


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
        re, im = _load_tuple(z + at, SIZE * e, here, R, stride_plane)
        re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
        up_re, up_im = _load_tuple(up + at, SIZE * e, here, R, stride_plane)
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
    re, im = _load_tuple(z + (j // BE * LAST) * e + c, e, c < e, LAST, stride_plane)
    re, im = inverse(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    z += (i // BE) * e + c
    gl.thread_barrier()
    for r in gl.static_range(R):
        gl.store(z + r * SIZE * e, re[r], mask=c < e)
        gl.store(z + r * SIZE * e + stride_plane, im[r], mask=c < e)
