"""Layers as the repositories of S4 and S5 name them: {name: tensor} to a mixer, and back.

Their checkpoints are of whole training runs and have no config.json, so what is read here is a layer:

    s4           S4's models/s4/s4.py, S4Block with mode "dplr": the published S4, and SaShiMi's layers
    s4d          the same with mode "diag"
    s4d_minimal  S4's models/s4/s4d.py
    s5           S5's SequenceLayer, the flax tree joined by dots; its norm belongs to the block and is left out

Sizes are read off the tensors; what they do not tell is given as the mixer's own settings.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longwave.config import nearest
from longwave.errors import LongwaveError, UsageError
from longwave.hub.keys import Layout, Rename, to_ours, to_published
from longwave.mixers.s4 import S4
from longwave.mixers.s4d import S4D
from longwave.mixers.s5 import S5
from longwave.models.saving import Stored, fill
from longwave.ops.discretize import discretize

LENGTH = "layer.kernel.l_kernel"
REMEDY = (
    "Name the layer's kind and prefix; longwave has one channel, one direction and one dt for all of a channel's modes"
)


def load_layer(tensors: Mapping[str, Tensor], kind: str, *, prefix: str = "", **settings: Any) -> S4 | S4D | S5:
    """The mixer whose weights `tensors` holds under names that begin with `prefix`; others are not looked at.

    `settings` are fields of the mixer's Config that weights do not tell: `discretization` of s4d; `clip_eigs`,
    `discretization`, `conj_sym` (assumed) and `activation` "half_glu2" (for half_glu1) of s5; `gelu`.

    S4's stored C is C~ = (I - Abar^l)^T C for the length l = l_kernel, or C itself where that is 0. C is solved for in
    float64: the mixer's kernel is the published one at every length up to l, and goes on beyond.

    Raises UsageError for an unknown kind or setting; LongwaveError, the first ten missing, left over and mis-shaped
    tensors listed, where names or shapes are others than the kind's.
    """
    layer = _known(kind)
    cls: Any = layer.mixer
    fields = [field.name for field in dataclasses.fields(cls.Config)]
    for name in settings:
        if name not in fields:
            raise UsageError(f"layers of kind {kind!r} have no setting {name!r}.{nearest(name, fields)}")
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    found = {name: tensor for name, tensor in found.items() if not name.startswith(layer.ignored)}
    where = f"the layer {prefix!r}, read as {kind},"
    d_model, sizes = layer.sizes(_Shapes(found, where), settings)
    with torch.device("meta"):
        mixer = cls(d_model, cls.Config(**sizes | settings))
    mixer = mixer.to(found[layer.reads].dtype)
    length = found.pop(LENGTH, None) if cls is S4 else None
    stored = {name: Stored(tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in found.items()}
    fill(mixer, to_ours(mixer, stored, layer.rename, where, REMEDY), where)
    if length is not None and length.item():
        with torch.no_grad():
            mixer.C.copy_(_unfolded(mixer, int(length), back=True))
    return mixer


@torch.no_grad()
def layer_state_dict(
    mixer: S4 | S4D | S5, kind: str | None = None, *, prefix: str = "", l_kernel: int = 0
) -> dict[str, Tensor]:
    """The weights of `mixer` under the names of `kind`, by default the mixer's own: the inverse of `load_layer`.

    `l_kernel`: store S4's C as C~ for that length. 0 stores C, which the published code turns into C~ when it first
    runs. Raises UsageError for an unknown kind and for what the kind cannot express.
    """
    kind = kind or str(mixer.config.kind)
    layer = _known(kind)
    if not isinstance(mixer, layer.mixer):
        raise UsageError(f"{kind} layers are {layer.mixer.__name__}, got {type(mixer).__name__}")
    layer.check(mixer)
    named = to_published(mixer, layer.rename)
    if isinstance(mixer, S4):
        named[LENGTH] = torch.tensor(l_kernel)
        if l_kernel:
            named[layer.reads] = _unfolded(mixer, l_kernel).to(mixer.C.dtype)[None]
    return {prefix + name: tensor for name, tensor in named.items()}


def _unfolded(mixer: S4, l: int, *, back: bool = False) -> Tensor:
    """C~ = (I - Abar^l)^T C from the mixer's C, or `back`; pairs (d, n/2, 2) in float64.

    The real form of 2 Re(C x) is the product with 2 Re C and -2 Im C.
    """
    A, B, C = mixer.dense()
    Abar, _ = discretize(A, B, 1.0, "bilinear")
    change = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - torch.linalg.matrix_power(Abar, l).mT
    C = torch.linalg.solve(change, C) if back else (change @ C[..., None])[..., 0]
    return C.unflatten(-1, (-1, 2)) * C.new_tensor([0.5, -0.5])


class _Shapes:
    """Sizes of found tensors, by name."""

    def __init__(self, found: Mapping[str, Tensor], where: str):
        self.found, self.where = found, where

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.found:
            raise LongwaveError(f"{self.where} has no tensor {name}.{nearest(name, self.found)}")
        shape = tuple(self.found[name].shape)
        if len(shape) != axes:
            raise LongwaveError(f"{self.where} has {name} with {len(shape)} axes, {list(shape)}; expected {axes}")
        return shape

    def has(self, name: str) -> bool:
        return name in self.found


class _Kind(NamedTuple):
    mixer: type[S4] | type[S4D] | type[S5]
    rename: Rename
    reads: str  # a tensor that is always there
    sizes: Callable[[_Shapes, Mapping[str, Any]], tuple[int, dict[str, Any]]]  # d_model and settings, from settings
    check: Callable[[Any], None]
    ignored: tuple[str, ...] = ()


def _shaped(name: str, pack: Callable[[Tensor], Tensor]) -> Layout:
    """One of ours in another shape."""
    return Layout((name,), lambda ours: [pack(ours[0])], lambda theirs, shapes: [theirs[0].reshape(shapes[0])])


def _transposed(name: str) -> Layout:
    return Layout((name,), lambda ours: [ours[0].mT], lambda theirs, shapes: [theirs[0].mT])


def _minimal_pack(ours: Sequence[Tensor]) -> Sequence[Tensor]:
    B, C = (torch.view_as_complex(t) for t in ours)
    return [torch.view_as_real((B * C).conj().resolve_conj())]


def _minimal_unpack(theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
    C = theirs[0] * theirs[0].new_tensor([1.0, -1.0])
    return [theirs[0].new_tensor([1.0, 0.0]).expand(shapes[0]), C]


def _s4_sizes(shapes: _Shapes, settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    rank = shapes.of("layer.kernel.P", 4)[0]
    if rank not in (1, 2):
        raise LongwaveError(f"{shapes.where} has a low-rank term of rank {rank}; longwave has rank 1 and 2")
    d, sizes = _s4d_sizes(shapes, settings)
    return d, sizes | {"init": "legs" if rank == 1 else "legt"}


def _s4d_sizes(shapes: _Shapes, settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    _, d, n, _ = shapes.of("layer.kernel.C", 4)
    n_ssm = shapes.of("layer.kernel.B", 4)[1]
    return d, {"d_state": 2 * n, "n_ssm": n_ssm, "glu": shapes.has("output_linear.0.weight")}


def _minimal_sizes(shapes: _Shapes, settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    d, n, _ = shapes.of("kernel.C", 3)
    return d, {"d_state": 2 * n}


def _s5_sizes(shapes: _Shapes, settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    d, p, _ = shapes.of("seq.C", 3)
    gate = "half_glu1" if shapes.has("out2.kernel") else "gelu"
    activation = "full_glu" if shapes.has("out1.kernel") else gate
    return d, {"d_state": 2 * p if settings.get("conj_sym", True) else p, "activation": activation}


def _needs(kind: str, mixer: Any, **fields: Any) -> None:
    for name, value in fields.items():
        if getattr(mixer.config, name) != value:
            raise UsageError(f"{kind} layers are of {name}={value!r}, got {name}={getattr(mixer.config, name)!r}")


def _check_minimal(mixer: S4D) -> None:
    _needs("s4d_minimal", mixer, discretization="zoh", skip=True, gelu=True, glu=True)
    if mixer.n_ssm != mixer.d_model:
        raise UsageError(f"s4d_minimal layers have an A for each of {mixer.d_model} channels, got n_ssm={mixer.n_ssm}")


_s4d_names: dict[str, str | Layout] = {
    "D": _shaped("layer.D", lambda D: D[None]),
    "inv_dt": _shaped("layer.kernel.inv_dt", lambda dt: dt[:, None]),
    "A_real": "layer.kernel.A_real",
    "A_imag": "layer.kernel.A_imag",
    "B": _shaped("layer.kernel.B", lambda B: B[None]),
    "C": _shaped("layer.kernel.C", lambda C: C[None]),
    "output_linear": "output_linear.0",
}
_minimal_C = Layout(("kernel.C",), _minimal_pack, _minimal_unpack)
_minimal_names: dict[str, str | Layout] = {
    "D": "D",
    "inv_dt": "kernel.log_dt",
    "A_real": "kernel.log_A_real",
    "A_imag": "kernel.A_imag",
    "B": _minimal_C,
    "C": _minimal_C,
    "output_linear.weight": _shaped("output_linear.0.weight", lambda weight: weight[..., None]),
    "output_linear.bias": "output_linear.0.bias",
}
_s5_names: dict[str, str | Layout] = {
    **{name: f"seq.{name}" for name in ("Lambda_re", "Lambda_im", "B", "C", "D", "log_step")},
    **{f"{out}.weight": _transposed(f"{out}.kernel") for out in ("out1", "out2")},
    **{f"{out}.bias": f"{out}.bias" for out in ("out1", "out2")},
}
KINDS: dict[str, _Kind] = {
    "s4": _Kind(
        S4,
        _s4d_names | {"P": "layer.kernel.P"},
        "layer.kernel.C",
        _s4_sizes,
        lambda mixer: _needs("s4", mixer, discretization="bilinear", skip=True),
    ),
    "s4d": _Kind(S4D, _s4d_names, "layer.kernel.C", _s4d_sizes, lambda mixer: _needs("s4d", mixer, skip=True)),
    "s4d_minimal": _Kind(S4D, _minimal_names, "kernel.C", _minimal_sizes, _check_minimal),
    "s5": _Kind(S5, _s5_names, "seq.C", _s5_sizes, lambda mixer: _needs("s5", mixer, skip=True), ("norm.",)),
}


def _known(kind: str) -> _Kind:
    if kind not in KINDS:
        raise UsageError(f"no layers of kind {kind!r} are known.{nearest(kind, KINDS)}")
    return KINDS[kind]
