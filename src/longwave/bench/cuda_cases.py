"""What `longwave bench ops --device cuda` measures: sizes of large layers in bfloat16, parameters in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longwave import ops
from longwave.bench import plain
from longwave.bench.calls import Inputs
from longwave.bench.case import Case, Shape, fft_conv_operations, first, mamba3_operations, step_inputs
from longwave.bench.peers import OURS
from longwave.ops.causal_conv1d import samples as conv_samples
from longwave.ops.diagonal_scan import samples as diagonal_samples
from longwave.ops.fft_conv import samples as fft_samples
from longwave.ops.gated_rms_norm import samples as norm_samples
from longwave.ops.mamba3_scan import samples as mamba3_samples
from longwave.ops.selective_scan import samples as scan_samples
from longwave.ops.ssd import samples as ssd_samples
from longwave.ops.ssd import ssd_step
from longwave.ops.ssm_kernel import samples as kernel_samples
from longwave.ops.ssm_kernel import vandermonde_kernel


def _float32(make: Callable[..., Inputs], *parameters: str) -> Callable[..., Inputs]:
    """`make` with these of its tensors in float32."""

    def make_so(*args: Any, **options: Any) -> Inputs:
        inputs = make(*args, **options)
        return inputs | {name: _wide(inputs[name]) for name in parameters}

    return make_so


def _wide(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()


def _per_channel(operations: int) -> Callable[[Shape], int]:
    """So many for each channel of each token."""
    return lambda s: s["b"] * s["l"] * s["e"] * operations


def _selective_scan(b: int, l: int) -> Case:
    # instructions for each state, counted as two operations: 4 forward, 14 backward; one exponential
    return Case(
        full={"b": b, "l": l, "e": 2048, "n": 16, "dt_softplus": True},
        small={"b": 2, "l": 40, "e": 64, "n": 16, "dt_softplus": True},
        make=scan_samples.make,
        contenders={OURS: first(ops.selective_scan)},
        operations=lambda s: _per_channel(8 * s["n"])(s),
        backward_operations=lambda s: _per_channel(28 * s["n"])(s),
        exponentials=lambda s: _per_channel(s["n"])(s),
        arithmetic=torch.float32,
        dtype=torch.bfloat16,
        peers=(("mamba_ssm", "mamba_ssm", "selective_scan"),),
    )


_HEADS = {"h": 64, "p": 64, "n": 128, "g": 1}
_SMALL_HEADS = {"b": 2, "l": 40, "h": 2, "p": 32, "n": 16, "g": 1}
_SSD_PEERS = (("mamba_ssm", "mamba_ssm", "ssd"), ("fla", "fla", "ssd"))


def _ssd(b: int, l: int, **options: Any) -> Case:
    return Case(
        full=_HEADS | {"b": b, "l": l, "dt_softplus": True},
        small=_SMALL_HEADS | {"dt_softplus": True},
        make=ssd_samples.make,
        contenders={OURS: first(ops.ssd)},
        operations=lambda s: s["b"] * s["l"] * s["h"] * (5 * s["p"] * s["n"] + 3 * s["p"] + 2),
        dtype=torch.bfloat16,
        peers=_SSD_PEERS,
        **options,
    )


def _fft_conv(b: int, l: int, dtype: torch.dtype) -> Case:
    return Case(
        full={"b": b, "l": l, "e": 768, "k": l, "D": True},
        small={"b": 2, "l": 40, "e": 24, "k": 40, "D": True},
        make=_float32(fft_samples.make, "kernel", "D"),
        contenders={OURS: first(ops.fft_conv), "torch fft": plain.FFT_CONV_ROWS},
        operations=fft_conv_operations,
        arithmetic=torch.bfloat16,  # which takes more of them as matrices, but they are faster
        dtype=dtype,
    )


def _ssd_step(b: int, copies: int) -> Case:
    return Case(
        full=_HEADS | {"b": b, "h": 80, "dt_softplus": True},
        small=_SMALL_HEADS | {"dt_softplus": True},
        make=step_inputs(ssd_samples.make, ssd_samples.initial_state, ("x", "dt", "B", "C")),
        contenders={OURS: ssd_step},
        operations=lambda s: s["b"] * s["h"] * (5 * s["p"] * s["n"] + 3 * s["p"] + 2),
        arithmetic=torch.float32,
        dtype=torch.bfloat16,
        backward=False,
        peers=(("mamba_ssm", "mamba_ssm", "ssd_step"),),
        copies=copies,
        graph=True,
    )


CUDA_CASES: dict[str, Case] = {
    "selective_scan b8 l2048": _selective_scan(8, 2048),
    "selective_scan b2 l8192": _selective_scan(2, 8192),
    "selective_scan b1 l32768": _selective_scan(1, 32768),
    "ssd b8 l4096": _ssd(8, 4096),
    "ssd b2 l16384": _ssd(2, 16384),
    "ssd b1 l131072": _ssd(1, 131072),
    "ssd b1 l2048 graph": _ssd(1, 2048, graph=True, copies=4),
    "mamba3_scan b8 l4096": Case(
        full=_HEADS | {"b": 8, "l": 4096, "r": 1, "s": 32, "z": True},
        small=_SMALL_HEADS | {"r": 1, "s": 4, "z": True},
        make=mamba3_samples.make,
        contenders={OURS: first(ops.mamba3_scan)},
        operations=mamba3_operations,
        dtype=torch.bfloat16,
        peers=(("mamba_ssm", "mamba_ssm", "mamba3_scan"),),
    ),
    "causal_conv1d b8 l4096": Case(
        full={"b": 8, "l": 4096, "e": 4352, "w": 4, "activation": "silu"},
        small={"b": 2, "l": 40, "e": 64, "w": 4, "activation": "silu"},
        make=_float32(conv_samples.make, "weight", "bias"),
        contenders={OURS: first(ops.causal_conv1d)},
        operations=lambda s: _per_channel(2 * s["w"])(s),
        arithmetic=torch.float32,
        dtype=torch.bfloat16,
        peers=(("causal-conv1d", "causal_conv1d", "causal_conv1d"), ("fla", "fla", "causal_conv1d")),
    ),
    "fft_conv float32 b8 l2048": _fft_conv(8, 2048, torch.float32),
    "fft_conv float32 b8 l8192": _fft_conv(8, 8192, torch.float32),
    "fft_conv float32 b2 l65536": _fft_conv(2, 65536, torch.float32),
    "fft_conv bfloat16 b8 l2048": _fft_conv(8, 2048, torch.bfloat16),
    "fft_conv bfloat16 b8 l8192": _fft_conv(8, 8192, torch.bfloat16),
    "fft_conv bfloat16 b2 l65536": _fft_conv(2, 65536, torch.bfloat16),
    "ssm_kernel e1024 l16384": Case(
        full={"m": 1, "e": 1024, "n": 32, "l": 16384},  # S4's d_state of 64 is 32 conjugate pairs
        small={"m": 1, "e": 24, "n": 4, "l": 300},
        make=kernel_samples.make,
        contenders={
            OURS: vandermonde_kernel,
            "torch product": plain.vandermonde_kernel,
            "torch factored": plain.factored_vandermonde_kernel,
        },
        operations=lambda s: s["m"] * s["e"] * s["l"] * 4 * s["n"],
        arithmetic=torch.bfloat16,
    ),
    "gated_rms_norm b8 l4096": Case(
        full={"b": 8, "l": 4096, "e": 4096, "gate": True},
        small={"b": 2, "l": 40, "e": 64, "gate": True},
        make=norm_samples.make,
        contenders={OURS: ops.gated_rms_norm, "torch rms_norm": plain.gated_rms_norm},
        operations=_per_channel(8),
        arithmetic=torch.float32,
        dtype=torch.bfloat16,
        peers=(("mamba_ssm", "mamba_ssm", "gated_rms_norm"),),
    ),
    "diagonal_scan b8 l2048": Case(
        full={"b": 8, "l": 2048, "e": 1024, "n": 32},
        small={"b": 2, "l": 40, "e": 24, "n": 4},
        make=diagonal_samples.make,
        contenders={OURS: first(ops.diagonal_scan), "torch loop": plain.diagonal_scan},
        operations=lambda s: _per_channel(20 * s["n"])(s),
        exponentials=lambda s: _per_channel(3 * s["n"])(s),  # of a complex number: one, a sine and a cosine
        arithmetic=torch.float32,
        dtype=torch.bfloat16,
        forward_only=("torch loop",),  # its graph holds every state several times
    ),
    "ssd_step b1": _ssd_step(1, copies=48),  # more than the cache holds
    "ssd_step b64": _ssd_step(64, copies=2),
    "ssd_step b256": _ssd_step(256, copies=1),
}
