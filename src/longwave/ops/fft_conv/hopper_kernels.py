"""The long convolution inside one program: a block's inputs are read, transformed, multiplied and brought back on chip.

2n real points of a block are n complex ones: point p in the real part, p + n in the imaginary one, modulo z^n - i (see
`gluon_fft.turns`). HALF: only the first n points hold anything, of inputs and of results. Spectra, times 1/n, lie as
the programs that make them have them: (programs, 2, n BE).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longwave.ops.gluon_fft import cosine, first, flat_layout, forward, inverse, last, sine


@gluon.jit
def twist(low, high, HALF: gl.constexpr, R: gl.constexpr):
    """R complex numbers from the points that they carry."""
    re, im = (), ()
    for r in gl.static_range(R):
        if HALF:
            re, im = re + (low[r] * cosine(r, 4 * R),), im + (low[r] * sine(r, 4 * R),)
        else:
            re = re + (low[r] * cosine(r, 4 * R) - high[r] * sine(r, 4 * R),)
            im = im + (low[r] * sine(r, 4 * R) + high[r] * cosine(r, 4 * R),)
    return re, im


@gluon.jit
def take_real(re, im, HALF: gl.constexpr, R: gl.constexpr):
    """The points that the numbers carry, R of the first half, and unless HALF as many of the second."""
    low, high = (), ()
    for r in gl.static_range(R):
        low = low + (re[r] * cosine(r, 4 * R) + im[r] * sine(r, 4 * R),)
        if not HALF:
            high = high + (im[r] * cosine(r, 4 * R) - re[r] * sine(r, 4 * R),)
    return low + high


@gluon.jit
def load_tokens(x, history, stride_t, stride_ht, time, low, stop, held, here, HISTORY: gl.constexpr):
    """The inputs at `time` in float32, zeros for times before `low` and from `stop` on.

    Like all that is read once they go past the first cache (.cg), in which the tables of turns are to stay.
    """
    mask = here & (time >= gl.maximum(low, 0)) & (time < stop)
    value = gl.load(x + time.to(gl.int64) * stride_t, mask=mask, other=0.0, cache_modifier=".cg").to(gl.float32)
    if HISTORY:
        mask = here & (time >= gl.maximum(low, -held)) & (time < gl.minimum(stop, 0))
        past = gl.load(history + (time + held).to(gl.int64) * stride_ht, mask=mask, other=0.0)
        value += past.to(gl.float32)
    return value


@gluon.jit
def convolve_kernel(
    x, history, lengths, h, D, y, final, table, plane,
    rows, l, e, blocks, q, offset, begin, y_begin, y_length, reach, held, keep,
    stride_xb, stride_xt, stride_hb, stride_ht,
    CONJ: gl.constexpr, HALF: gl.constexpr, HISTORY: gl.constexpr, FINAL: gl.constexpr, DFINAL: gl.constexpr,
    LENGTHS: gl.constexpr, SKIP: gl.constexpr,
    RADICES: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """y[t] for t = t0..t0+q-1, t0 = begin + q block. Point 0 of a block is time t0 - offset."""
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    program = gl.program_id(0).to(gl.int64)
    row = program % rows
    block = (program // rows % blocks).to(gl.int32)
    c0 = (program // (rows * blocks)).to(gl.int32) * BE
    t0 = begin + block * q
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    here = c < e
    time = t0 - offset + i // BE
    stop = l
    if LENGTHS:
        stop = gl.load(lengths + row).to(gl.int32)
    x += row * stride_xb + c
    history += row * stride_hb + c
    stop_in = gl.minimum(stop, t0 - offset + reach)
    parts = ()
    for r in gl.static_range(R if HALF else 2 * R):
        t = time + r * SIZE
        value = load_tokens(x, history, stride_xt, stride_ht, t, t0 - offset, stop_in, held, here, HISTORY)
        if FINAL:
            at = t - (l - keep)
            mask = here & (at >= 0) & (at < keep) & (t < stop_in)
            gl.store(final + (row * keep + at) * e + c, value.to(final.dtype.element_ty), mask=mask)
        parts = parts + (value,)
    low, high = parts[:R], parts[R:]
    re, im = twist(low, high, HALF, R)
    re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)

    j = gl.arange(0, N // LAST * BE, layout=layout)
    at = h + c0.to(gl.int64) * (2 * N) + j
    c_h = c0 + j % BE
    skip = gl.zeros([N // LAST * BE], gl.float32, layout)
    if SKIP:
        skip = gl.load(D + c_h, mask=c_h < e, other=0.0).to(gl.float32) * (1.0 / N)
    product_re, product_im = (), ()
    for r in gl.static_range(LAST):
        h_re = gl.load(at + r * (N // LAST * BE), cache_modifier=".cg") + skip
        h_im = gl.load(at + (N + r * (N // LAST)) * BE, cache_modifier=".cg")
        if CONJ:
            h_im = -h_im
        product_re = product_re + (re[r] * h_re - im[r] * h_im,)
        product_im = product_im + (re[r] * h_im + im[r] * h_re,)
    re, im = inverse(product_re, product_im, table, plane, RADICES, 1, SIZE, BE, VEC)

    y += row * y_length * e + c
    end = y_begin + y_length
    limit = gl.minimum(t0 + q, end)
    values = take_real(re, im, HALF, R)
    for r in gl.static_range(R if HALF else 2 * R):
        t = time + r * SIZE
        mask = here & (t >= t0) & (t < limit)
        value = values[r]
        if LENGTHS:
            value = gl.where(t < stop, value, 0.0)
        if DFINAL:
            at = t - (end - keep)
            value += gl.load(final + (row * keep + at) * e + c, mask=mask & (at >= 0), other=0.0).to(gl.float32)
        gl.store(y + (t - y_begin).to(gl.int64) * e, value.to(y.dtype.element_ty), mask=mask)


@gluon.jit
def spectrum_kernel(
    kernel, h, table, plane, taps, e, stride_t,
    HALF: gl.constexpr, RADICES: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    c0 = gl.program_id(0) * BE
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    at = kernel + c
    parts = ()
    for r in gl.static_range(R if HALF else 2 * R):
        t = i // BE + r * SIZE
        value = gl.load(at + t.to(gl.int64) * stride_t, mask=(c < e) & (t < taps), other=0.0)
        parts = parts + (value.to(gl.float32),)
    re, im = twist(parts[:R], parts[R:], HALF, R)
    re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    j = gl.arange(0, N // LAST * BE, layout=layout)
    at = h + c0.to(gl.int64) * (2 * N) + j
    for r in gl.static_range(LAST):
        gl.store(at + r * (N // LAST * BE), re[r] * (1.0 / N))
        gl.store(at + (N + r * (N // LAST)) * BE, im[r] * (1.0 / N))


@gluon.jit
def correlate_kernel(
    x, history, lengths, dy, parts, skip_parts, table, plane,
    rows, l, e, blocks, q, offset, held, splits,
    stride_xb, stride_xt, stride_hb, stride_ht, stride_yb, stride_yt,
    HALF: gl.constexpr, HISTORY: gl.constexpr, LENGTHS: gl.constexpr, SKIP: gl.constexpr,
    RADICES: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """The spectrum of the taps' gradient, (splits, e, 2, n), each from the blocks that are `split` modulo splits."""
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    split = gl.program_id(0) % splits
    c0 = gl.program_id(0) // splits * BE
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    here = c < e
    j = gl.arange(0, N // LAST * BE, layout=layout)
    at = parts + (split.to(gl.int64) * (gl.cdiv(e, BE) * BE) + c0) * (2 * N) + j
    skip = gl.zeros([SIZE * BE], gl.float32, layout)
    for piece in range(split, rows * blocks, splits):
        row = (piece % rows).to(gl.int64)
        t0 = piece // rows * q
        time = t0 - offset + i // BE
        stop = l
        if LENGTHS:
            stop = gl.load(lengths + row).to(gl.int32)
        x_row, past, up = x + row * stride_xb + c, history + row * stride_hb + c, dy + row * stride_yb + c
        limit = gl.minimum(stop, t0 + q)
        inputs, ups = (), ()
        for r in gl.static_range(R if HALF else 2 * R):
            t = time + r * SIZE
            a = load_tokens(x_row, past, stride_xt, stride_ht, t, t0 - offset, limit, held, here, HISTORY)
            g = load_tokens(up, up, stride_yt, stride_yt, t, t0, limit, 0, here, False)
            inputs, ups = inputs + (a,), ups + (g,)
            if SKIP:
                skip += a * g
        re, im = twist(inputs[:R], inputs[R:], HALF, R)
        re, im = forward(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
        up_re, up_im = twist(ups[:R], ups[R:], HALF, R)
        up_re, up_im = forward(up_re, up_im, table, plane, RADICES, 1, SIZE, BE, VEC)
        more = gl.full([N // LAST * BE], piece > split, gl.int1, layout)
        for r in gl.static_range(LAST):
            total_re = gl.load(at + r * (N // LAST * BE), mask=more, other=0.0, cache_modifier=".cg")
            total_im = gl.load(at + (N + r * (N // LAST)) * BE, mask=more, other=0.0, cache_modifier=".cg")
            total_re += re[r] * up_re[r] + im[r] * up_im[r]
            total_im += re[r] * up_im[r] - im[r] * up_re[r]
            gl.store(at + r * (N // LAST * BE), total_re)
            gl.store(at + (N + r * (N // LAST)) * BE, total_im)
    if SKIP:
        total = gl.sum(skip.reshape([SIZE, BE]), 0)
        k = gl.arange(0, BE, layout=total.type.layout)
        gl.store(skip_parts + split * e + c0 + k, total, mask=c0 + k < e)


@gluon.jit
def taps_kernel(
    parts, dkernel, table, plane, taps, e, splits, stride_e, stride_t,
    HALF: gl.constexpr, RADICES: gl.constexpr, N: gl.constexpr, BE: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """The taps' gradient from the sum of its spectra."""
    R: gl.constexpr = first(RADICES)
    LAST: gl.constexpr = last(RADICES)
    SIZE: gl.constexpr = N // R
    layout: gl.constexpr = flat_layout(VEC, gl.num_warps())
    c0 = gl.program_id(0) * BE
    j = gl.arange(0, N // LAST * BE, layout=layout)
    re, im = (), ()
    for r in gl.static_range(LAST):
        at = parts + c0.to(gl.int64) * (2 * N) + j + r * (N // LAST * BE)
        total_re = gl.zeros([N // LAST * BE], gl.float32, layout)
        total_im = gl.zeros([N // LAST * BE], gl.float32, layout)
        for _ in range(splits):
            total_re += gl.load(at)
            total_im += gl.load(at + N * BE)
            at += (gl.cdiv(e, BE) * BE).to(gl.int64) * (2 * N)
        re, im = re + (total_re * (1.0 / N),), im + (total_im * (1.0 / N),)
    re, im = inverse(re, im, table, plane, RADICES, 1, SIZE, BE, VEC)
    i = gl.arange(0, SIZE * BE, layout=layout)
    c = c0 + i % BE
    at = dkernel + c.to(gl.int64) * stride_e
    values = take_real(re, im, HALF, R)
    for r in gl.static_range(R if HALF else 2 * R):
        t = i // BE + r * SIZE
        value = values[r].to(dkernel.dtype.element_ty)
        gl.store(at + t.to(gl.int64) * stride_t, value, mask=(c < e) & (t < taps))


@gluon.jit
def transpose_kernel(x, y, rows, columns, stride_xr, stride_xc, stride_yr, stride_yc, B: gl.constexpr):
    """y = x (rows, columns) transposed, whichever way round the axes lie in either."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    across = gl.cdiv(columns, B)
    r0, c0 = gl.program_id(0) // across * B, gl.program_id(0) % across * B
    slow = gl.arange(0, B, layout=gl.SliceLayout(1, layout))[:, None]
    fast = gl.arange(0, B, layout=gl.SliceLayout(0, layout))[None, :]
    r, c = (r0 + slow).to(gl.int64), c0 + fast
    tile = gl.load(x + r * stride_xr + c * stride_xc, mask=(r < rows) & (c < columns), other=0.0)
    tile = gl.convert_layout(tile.permute([1, 0]), layout).to(y.dtype.element_ty)
    r, c = r0 + fast, (c0 + slow).to(gl.int64)
    gl.store(y + c * stride_yr + r * stride_yc, tile, mask=(r < rows) & (c < columns))
