"""What Mamba-3's backward kernels on Hopper share: tiles of 64 tokens, their copies, and pairs of channels that turn.

Adjacent channels are the pairs, and so lie in one thread's registers; the first half of the channels holds those that
may turn. See `triton_rotation` for the angles in memory.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longwave.ops.gluon_math import widen

Q = gl.constexpr(64)  # tokens of a chunk and channels of a head: the rows of one wgmma
N = gl.constexpr(128)  # channels of B and C
TURNED = gl.constexpr(32)  # pairs that may turn: the first half of these channels
SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # (token, token or p), (token or p, n)
TURN = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))  # (token, pair), as sums
PAIR = gl.constexpr(  # (token, pair), where SUM has the two channels
    gl.DistributedLinearLayout(
        [[8, 0], [0, 4], [0, 8], [0, 16]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 32]
    )
)
OF_BIAS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))  # (n, 8)
OPERAND = gl.constexpr(gl.DotOperandLayout(0, SUM.value, 2))
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
WARPS = 4
RADIANS = gl.constexpr(6.283185307179586)


@gluon.jit
def circle_of(phase, base, number, RESET: gl.constexpr):
    """cos and sin (token, pair), two halves of 32 bits, of a tile of phases and the chunk's `base` in turns."""
    base = (base.reshape([TURNED]).load(gl.SliceLayout(0, PAIR)) * RADIANS)[None, :]
    angle = phase.load(PAIR).to(gl.float32) * (RADIANS / 65536.0)
    angle += gl.where((number == 0)[:, None], base, 0.0) if RESET else base
    return gl.inline_asm_elementwise(
        "{ .reg .f32 c, s; cos.approx.ftz.f32 c, $1; sin.approx.ftz.f32 s, $1; cvt.rn.f16x2.f32 $0, s, c; }",
        "=r,f", [angle], gl.int32, True, 1,
    )  # fmt: skip


@gluon.jit
def cos_sin_of(circle):
    return gl.inline_asm_elementwise(
        "{ .reg .f16 c, s; mov.b32 {c, s}, $2; cvt.f32.f16 $0, c; cvt.f32.f16 $1, s; }",
        "=f,=f,r", [circle], (gl.float32, gl.float32), True, 1,
    )  # fmt: skip


@gluon.jit
def pairs_of(u):
    """First and second channels (token, pair) of the pairs that may turn, and the other half of the channels."""
    front, back = gl.split(gl.permute(gl.reshape(u, [Q, 2, N // 2]), (0, 2, 1)))
    first, second = gl.split(gl.reshape(front, [Q, TURNED, 2]))
    first, second = (
        gl.convert_layout(first, PAIR, assert_trivial=True),
        gl.convert_layout(second, PAIR, assert_trivial=True),
    )
    return first, second, back


@gluon.jit
def channels_of(first, second, back):
    front = gl.reshape(gl.join(first, second), [Q, N // 2])
    front = gl.convert_layout(front, back.type.layout, assert_trivial=True)
    u = gl.reshape(gl.permute(gl.join(front, back), (0, 2, 1)), [Q, N])
    return gl.convert_layout(u, SUM, assert_trivial=True)


@gluon.jit
def scattered(u):
    """(token, pair) with the pairs of one thread side by side, to be stored: pair 4 i + j at 8 j + i."""
    return gl.reshape(gl.permute(gl.reshape(u, [Q, 8, 4]), (0, 2, 1)), [Q, TURNED])


@gluon.jit
def turned_by(u, circle, BACK: gl.constexpr):
    first, second, back = pairs_of(u)
    cosine, sine = cos_sin_of(circle)
    if BACK:
        return channels_of(first * cosine + second * sine, second * cosine - first * sine, back)
    else:
        return channels_of(first * cosine - second * sine, first * sine + second * cosine, back)


@gluon.jit
def biased(tile, bias, BIAS: gl.constexpr):
    """A chunk of B or C in float32, with the head's bias."""
    u = widen(tile.load(SUM))
    if BIAS:
        u += bias.reshape([N]).load(gl.SliceLayout(0, SUM))[None, :]
    return u


@gluon.jit
def front_of(tile, bias, circle, BIAS: gl.constexpr):
    """Of a chunk of B or C the pairs that may turn, turned, as the matrix products take them."""
    dtype: gl.constexpr = tile.dtype
    u = widen(tile.slice(0, 64, 1).load(SUM))
    if BIAS:
        u += bias.reshape([N]).slice(0, 64).load(gl.SliceLayout(0, SUM))[None, :]
    first, second = gl.split(gl.reshape(u, [Q, TURNED, 2]))
    first, second = (
        gl.convert_layout(first, PAIR, assert_trivial=True),
        gl.convert_layout(second, PAIR, assert_trivial=True),
    )
    cosine, sine = cos_sin_of(circle)
    u_1, u_2 = first * cosine - second * sine, first * sine + second * cosine
    return widen(u_1.to(dtype)), widen(u_2.to(dtype))


@gluon.jit
def back_of(tile, bias, BIAS: gl.constexpr):
    """The other channels."""
    u = widen(tile.slice(64, 64, 1).load(SUM))
    if BIAS:
        u += bias.reshape([N]).slice(64, 64).load(gl.SliceLayout(0, SUM))[None, :]
    return widen(u.to(tile.dtype))


@gluon.jit
def barriers():
    """One for each copy: the compiler puts a barrier of threads between two that share one."""
    bars = (
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    for k in gl.static_range(8):
        mbarrier.init(bars[k], count=1)
    return bars


@gluon.jit
def wait_for(bars, COUNT: gl.constexpr, phase):
    for k in gl.static_range(COUNT):
        mbarrier.wait(bars[k], phase)


@gluon.jit
def discard(bars):
    for k in gl.static_range(8):
        mbarrier.invalidate(bars[k])


@gluon.jit
def expect(bars, blocks, pred):
    """All at once, for the same reason."""
    for k in gl.static_range(len(blocks)):
        mbarrier.expect(bars[k], blocks[k].block_type.nbytes, pred=pred)


@gluon.jit
def fetch_tile(block, to, bar, row, token, column, pred):
    """A tile of (b, l, h, p)."""
    shape: gl.constexpr = block.block_type.shape
    tma.async_copy_global_to_shared(block, [row, token, column, 0], bar, to.reshape(shape), pred=pred)


@gluon.jit
def fetch_angles(phases, bases, vectors, phase, base, vector, bars, chunk, bh, chunks, pred):
    """What turns a chunk of one head, and its sizes and decays."""
    tma.async_copy_global_to_shared(phases, [(bh * chunks + chunk) * Q, 0], bars[0], phase, pred=pred)
    tma.async_copy_global_to_shared(bases, [bh * (chunks + 1) + chunk, 0], bars[1], base, pred=pred)
    shape: gl.constexpr = vectors.block_type.shape
    vector = vector._reinterpret(gl.float32, shape, vectors.layout)
    tma.async_copy_global_to_shared(vectors, [0, bh, chunk * Q], bars[2], vector, pred=pred)


def vectors_of(t: Tensor) -> TensorDescriptor:
    """A chunk of three vectors (3, b, h, tokens) in float32, and nothing for a fourth: sizes are powers of two."""
    return TensorDescriptor.from_tensor(t.flatten(1, 2), [4, 1, 64], gl.NVMMASharedLayout(0, 32, 3))
