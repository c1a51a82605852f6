"""The mixers that the suite runs over: one small configuration for each option that changes what is computed."""

from typing import Any

import torch
from torch import Tensor, nn

from longwave.mixers import MIXERS, Attention, Mamba, Mamba2
from longwave.mixers.nested import map_tensors, reserve, tensors

D = 16
SMALL = {"d_state": 4, "d_head": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"d_state": 4}),
    "mamba-weightless": ("mamba", {"d_state": 4, "inner_norm": "weightless", "bias": True, "dt_rank": 3}),
    "mamba-learned": ("mamba", {"d_state": 5, "inner_norm": "learned", "d_conv": 2, "conv_bias": False, "expand": 1}),
    "mamba2": ("mamba2", SMALL),
    "mamba2-groups": ("mamba2", SMALL | {"n_groups": 2, "d_inner": 48, "d_head": 4, "bias": True, "chunk_len": 4}),
    "mamba2-limits": (
        "mamba2",
        SMALL | {"dt_limit": (0.01, 0.05), "D_per_channel": True, "norm_before_gate": True, "conv_bias": False},
    ),
    "mamba2-without-norm": ("mamba2", SMALL | {"norm": False, "in_multipliers": (0.5, 2.0, 3.0, 0.7, 1.5)}),
    "mamba3": ("mamba3", SMALL),
    "mamba3-groups": (
        "mamba3",
        {"d_state": 5, "d_head": 4, "d_inner": 24, "n_groups": 3, "norm": True, "chunk_len": 4},
    ),
    "mamba3-mimo": ("mamba3", SMALL | {"mimo_rank": 2, "rope_fraction": 1.0, "A_activation": "softplus"}),
    "mamba3-mimo-norm": ("mamba3", SMALL | {"mimo_rank": 3, "n_groups": 2, "norm": True, "A_floor": 0.5}),
    "h3": ("h3", {"d_state": 6}),
    "h3-heads": ("h3", {"d_state": 4, "d_head": 2, "discretization": "zoh"}),
    "hyena": ("hyena", {"l_max": 32, "d_filter": 8}),
    "hyena-order-3": (
        "hyena",
        {"l_max": 21, "order": 3, "d_filter": 6, "d_position": 5, "n_inner": 1, "shift": 0.05, "d_conv": 4},
    ),
    "hyena_modal": ("hyena_modal", {"d_state": 2}),
    "hyena_modal-heads": ("hyena_modal", {"d_state": 3, "n_heads": 4, "d_conv": 4, "conv_bias": False}),
    "lti": ("lti", {"d_state": 3}),
    "lti-bilinear": ("lti", {"d_state": 3, "n_ssm": 2, "init": "legt", "discretization": "bilinear", "glu": False}),
    "lti-euler": ("lti", {"d_state": 2, "discretization": "euler", "gelu": False, "skip": False}),
    "s4": ("s4", {"d_state": 4}),
    "s4-legt": ("s4", {"d_state": 4, "n_ssm": 4, "init": "legt", "glu": False, "skip": False}),
    "s4-zoh": ("s4", {"d_state": 4, "n_ssm": 1, "discretization": "zoh"}),
    "s4d": ("s4d", {"d_state": 6}),
    "s4d-shared": ("s4d", {"d_state": 4, "n_ssm": 4, "init": "inv", "discretization": "bilinear", "glu": False}),
    "s5": ("s5", {"d_state": 6}),
    "s5-blocks": ("s5", {"d_state": 8, "n_blocks": 2, "clip_eigs": True, "activation": "half_glu2"}),
    "s5-whole": ("s5", {"d_state": 3, "conj_sym": False, "discretization": "bilinear", "activation": "full_glu"}),
    "s4d-alone": ("s4d", {"d_state": 2, "init": "real", "gelu": False, "skip": False}),
    "attention": ("attention", {"n_heads": 2}),
    "attention-grouped": ("attention", {"n_heads": 4, "n_kv_heads": 2, "d_head": 8, "rotary": 0.5, "qkv_bias": True}),
    "attention-multi-query": (
        "attention",
        {"n_heads": 4, "n_kv_heads": 1, "rotary": 0.0, "scale": 0.3, "out_bias": True, "key_multiplier": 2.0},
    ),
    "attention-window": ("attention", {"n_heads": 2, "window": 5, "rotary_base": 500.0}),
    "attention-window-1": ("attention", {"n_heads": 2, "n_kv_heads": 1, "window": 1}),
    "lstm": ("lstm", {}),
    "lstm-projected": ("lstm", {"d_hidden": 12, "bias": False}),
    "gru": ("gru", {}),
    "gru-projected": ("gru", {"d_hidden": 20}),
    "parallel": ("parallel", {"mixers": (Mamba2.Config(**SMALL), Attention.Config(n_heads=2, window=5))}),
    "parallel-factors": (
        "parallel",
        {
            "mixers": (Mamba.Config(d_state=4), Mamba2.Config(**SMALL), Attention.Config(n_heads=2)),
            "in_multipliers": (0.5, 1.0, 2.0),
            "out_multipliers": (1.0, -0.5, 1.5),
        },
    ),
}
PLAIN = [name for name in CASES if name in MIXERS] + ["attention-window"]


def build(case: str, dtype: torch.dtype = torch.float64, d_model: int = D) -> Any:
    """The case's mixer, shaken."""
    kind, options = CASES[case]
    cls = MIXERS[kind]
    mixer = cls(d_model, cls.Config(**options)).to(dtype)
    shake(mixer)
    return mixer


def shake(module: nn.Module) -> None:
    """Move the parameters away from their initial values, which hide mistakes (D = 1, norms 1)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def row(state: Any, i: int) -> Any:
    """The state of sequence i alone."""
    return map_tensors(lambda tensor: tensor[i : i + 1], state)


def trimmed(state: Any) -> Any:
    return reserve(state, 0)


def assert_same_state(actual: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(tensors(trimmed(actual)), tensors(trimmed(expected)), **tolerance)


def held(state: Any) -> int:
    """Bytes of all tensors but the counters."""
    return sum(t.nbytes for t in tensors(state) if t.is_floating_point())


def leaves(mixer: Any, x: Tensor) -> list[Tensor]:
    return [x, *(parameter for parameter in mixer.parameters() if parameter.requires_grad)]
