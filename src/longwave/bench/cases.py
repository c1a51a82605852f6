"""What `longwave bench ops` measures on the CPU: operators, their sizes, and whom they run beside."""

from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import linear

from longwave import ops
from longwave.bench import plain
from longwave.bench.case import Case, fft_conv_operations, first, mamba3_operations, step_inputs
from longwave.bench.peers import OURS
from longwave.ops.causal_conv1d import causal_conv1d_step
from longwave.ops.causal_conv1d import samples as conv_samples
from longwave.ops.diagonal_scan import diagonal_scan_step
from longwave.ops.diagonal_scan import samples as diagonal_samples
from longwave.ops.fft_conv import samples as fft_samples
from longwave.ops.gated_rms_norm import samples as norm_samples
from longwave.ops.linear_step import linear_step
from longwave.ops.linear_step import samples as linear_samples
from longwave.ops.mamba3_scan import mamba3_scan_step
from longwave.ops.mamba3_scan import samples as mamba3_samples
from longwave.ops.selective_scan import samples as scan_samples
from longwave.ops.selective_scan import selective_scan_step
from longwave.ops.ssd import samples as ssd_samples
from longwave.ops.ssd import ssd_step
from longwave.ops.ssm_kernel import samples as kernel_samples
from longwave.ops.ssm_kernel import vandermonde_kernel

_LENGTH = {"l": 2048}
_SMALL_LENGTH = {"l": 40}
_SCAN = {"b": 1, "e": 1536, "n": 16}
_SSD = {"b": 1, "h": 24, "p": 64, "n": 128, "g": 1, "dt_softplus": True}
_MAMBA3 = {"b": 1, "h": 24, "p": 64, "r": 1, "g": 1, "n": 128, "s": 32, "z": True}
_SMALL_MAMBA3 = {"b": 1, "h": 2, "p": 32, "r": 1, "g": 1, "n": 16, "s": 4, "z": True}
_SMALL_SCAN = {"b": 1, "e": 64, "n": 16}
_SMALL_SSD = {"b": 1, "h": 2, "p": 32, "n": 16, "g": 1, "dt_softplus": True}
_LAYERS = 24  # of the 130M models


_linear = {
    "full": {"b": 1, "k": 768, "n": 3072},
    "small": {"b": 1, "k": 64, "n": 96},
    "make": linear_samples.make,
    "contenders": {OURS: linear_step, "torch linear": lambda x, weight, bias: linear(x, weight, bias)},
    "operations": lambda s: 2 * s["b"] * s["k"] * s["n"],
    "backward": False,
    "copies": _LAYERS,
}

_DIAGONAL = {"b": 1, "e": 512, "n": 32}
_SMALL_DIAGONAL = {"b": 1, "e": 24, "n": 4}

_FILTER = {"b": 1, "e": 768, "D": True}
_fft_conv = Case(
    full=_FILTER | {"l": 2048, "k": 2048},
    small={"b": 1, "e": 24, "D": True, "l": 40, "k": 40},
    make=fft_samples.make,
    contenders={
        OURS: first(ops.fft_conv),
        "torch fft": plain.fft_conv,
        "torch fft, transposed": partial(plain.fft_conv, transpose=True),
    },
    operations=fft_conv_operations,
)

CASES: dict[str, Case] = {
    "selective_scan": Case(
        full=_SCAN | _LENGTH | {"z": False, "dt_bias": False},
        small=_SMALL_SCAN | _SMALL_LENGTH | {"z": False, "dt_bias": False},
        make=scan_samples.make,
        contenders={
            OURS: first(ops.selective_scan),
            "torch loop": plain.selective_scan,
            "reference": first(ops.selective_scan, impl="reference"),
        },
        operations=lambda s: s["b"] * s["l"] * s["e"] * (7 * s["n"] + 3),
        peers=(("mambapy pscan", "mambapy", "selective_scan"),),
    ),
    "ssd": Case(
        full=_SSD | _LENGTH,
        small=_SMALL_SSD | _SMALL_LENGTH,
        make=ssd_samples.make,
        contenders={
            OURS: first(ops.ssd),
            "reference": first(ops.ssd, impl="reference"),
        },
        # as its recurrence, which blocks of matrix products exceed
        operations=lambda s: s["b"] * s["l"] * s["h"] * (5 * s["p"] * s["n"] + 3 * s["p"] + 2),
        forward_only=("reference",),  # its graph holds every state: 10 GB at full size
        peers=(("transformers", "transformers", "ssd"),),
    ),
    "mamba3_scan": Case(
        full=_MAMBA3 | _LENGTH,
        small=_SMALL_MAMBA3 | _SMALL_LENGTH,
        make=mamba3_samples.make,
        contenders={
            OURS: first(ops.mamba3_scan),
            "reference": first(ops.mamba3_scan, impl="reference"),
        },
        operations=mamba3_operations,
        forward_only=("reference",),  # as that of ssd
    ),
    "causal_conv1d": Case(
        full={"b": 1, "l": 2048, "e": 1536, "w": 4, "activation": "silu"},
        small={"b": 1, "l": 40, "e": 64, "w": 4, "activation": "silu"},
        make=conv_samples.make,
        contenders={
            OURS: first(ops.causal_conv1d),
            "torch conv1d": plain.causal_conv1d,
            "reference": first(ops.causal_conv1d, impl="reference"),
        },
        operations=lambda s: s["b"] * s["l"] * s["e"] * 2 * s["w"],
    ),
    "fft_conv": _fft_conv,
    "fft_conv_8192": replace(_fft_conv, full=_FILTER | {"l": 8192, "k": 8192}),
    "diagonal_scan": Case(
        full=_DIAGONAL | _LENGTH,
        small=_SMALL_DIAGONAL | _SMALL_LENGTH,
        make=diagonal_samples.make,
        contenders={
            OURS: first(ops.diagonal_scan),
            "torch loop": plain.diagonal_scan,
            "reference": first(ops.diagonal_scan, impl="reference"),
        },
        operations=lambda s: s["b"] * s["l"] * s["e"] * (22 * s["n"] + 2),  # an exponential counts as two
        forward_only=("reference",),
    ),
    "ssm_kernel": Case(
        full={"m": 1, "e": 1024, "n": 32, "l": 16384},  # S4's d_state of 64 is 32 conjugate pairs
        small={"m": 1, "e": 24, "n": 4, "l": 300},
        make=kernel_samples.make,
        contenders={
            OURS: vandermonde_kernel,
            "torch product": plain.vandermonde_kernel,
            "torch factored": plain.factored_vandermonde_kernel,
        },
        operations=lambda s: s["m"] * s["e"] * s["l"] * 4 * s["n"],
        forward_only=("torch product",),  # its graph holds every exponential: 4 GB at full size
    ),
    "gated_rms_norm": Case(
        full={"b": 1, "l": 2048, "e": 1536, "gate": True},
        small={"b": 1, "l": 40, "e": 64, "gate": True},
        make=norm_samples.make,
        contenders={
            OURS: ops.gated_rms_norm,
            "torch rms_norm": plain.gated_rms_norm,
            "reference": partial(ops.gated_rms_norm, impl="reference"),
        },
        operations=lambda s: s["b"] * s["l"] * s["e"] * 8,
    ),
    "selective_scan_step": Case(
        full=_SCAN | {"dt_softplus": True},
        small=_SMALL_SCAN | {"dt_softplus": True},
        make=step_inputs(scan_samples.make, scan_samples.initial_state, ("x", "dt", "B", "C", "z")),
        contenders={OURS: selective_scan_step, "torch": plain.selective_scan_step},
        operations=lambda s: s["b"] * s["e"] * (7 * s["n"] + 3),
        backward=False,
        copies=_LAYERS,
    ),
    "ssd_step": Case(
        full=_SSD,
        small=_SMALL_SSD,
        make=step_inputs(ssd_samples.make, ssd_samples.initial_state, ("x", "dt", "B", "C")),
        contenders={OURS: ssd_step, "torch": plain.ssd_step},
        operations=lambda s: s["b"] * s["h"] * (5 * s["p"] * s["n"] + 3 * s["p"] + 2),
        backward=False,
        copies=_LAYERS,
    ),
    "mamba3_scan_step": Case(
        full=_MAMBA3,
        small=_SMALL_MAMBA3,
        make=step_inputs(
            mamba3_samples.make, mamba3_samples.initial_state, ("x", "dt", "A", "B", "C", "trap", "angles", "z")
        ),
        contenders={OURS: mamba3_scan_step, "torch": plain.mamba3_scan_step},
        operations=lambda s: mamba3_operations(s | {"l": 1}),
        backward=False,
        copies=_LAYERS,
    ),
    "diagonal_scan_step": Case(
        full=_DIAGONAL,
        small=_SMALL_DIAGONAL,
        make=step_inputs(diagonal_samples.make, diagonal_samples.initial_state, ("u", "dt")),
        contenders={OURS: diagonal_scan_step, "torch": plain.diagonal_scan_step},
        operations=lambda s: s["b"] * s["e"] * (22 * s["n"] + 2),
        backward=False,
        copies=_LAYERS,
    ),
    "causal_conv1d_step": Case(
        full={"b": 1, "e": 1536, "w": 4, "activation": "silu"},
        small={"b": 1, "e": 64, "w": 4, "activation": "silu"},
        make=step_inputs(conv_samples.make, conv_samples.initial_state, ("x",)),
        contenders={OURS: causal_conv1d_step, "torch": plain.causal_conv1d_step},
        operations=lambda s: s["b"] * s["e"] * 2 * s["w"],
        backward=False,
        copies=_LAYERS,
    ),
    "linear_step": Case(**_linear),
    "linear_step_bfloat16": Case(**_linear, dtype=torch.bfloat16),
}
