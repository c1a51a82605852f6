"""The parameters that set what a state space keeps, its decay foremost: float32, not decayed; and how dt begins.

They stay in float32 when their module is cast to 16 bits. The decay exp(dt A) is applied once per token, so that the
error of 2^-9 which bfloat16 makes in A or dt is multiplied by the number of tokens that the state remembers.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.ops.checks import state_dtype


class Float32Parameters(nn.Module):
    """A module whose parameters named in `float32_parameters` ignore `.bfloat16()` and `.half()`, and no other cast.

    One that is None is left out.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ()

    def mark(self) -> None:
        """Flag them for the optimiser. A move off the meta device makes new parameters, without the flag."""
        for parameter in self._kept().values():
            parameter._no_weight_decay = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        before = {name: parameter.detach() for name, parameter in self._kept().items()}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.dtype.itemsize < 4 <= tensor.dtype.itemsize:
                after.data = tensor.to(after.device)
        self.mark()
        return self

    def _kept(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in self.float32_parameters}
        return {name: parameter for name, parameter in named.items() if parameter is not None}


def float32_parameter(*shape: int) -> nn.Parameter:
    """An empty parameter in float32, whatever torch's default dtype is, unless that is float64."""
    return nn.Parameter(torch.empty(*shape, dtype=state_dtype(torch.get_default_dtype())))


@torch.no_grad()
def init_dt_bias(bias: Tensor, low: float, high: float, floor: float) -> None:
    """Fill `bias` so that softplus(bias) is log-uniform in [low, high], but at least `floor`."""
    dt = torch.empty_like(bias).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt) = log(e^dt - 1)


def check_dt_range(config: Any) -> None:
    low, high, floor = config.dt_min, config.dt_max, config.dt_init_floor
    if not (0 < low <= high and floor > 0):
        raise UsageError(
            f"{config.kind}: need 0 < dt_min <= dt_max and dt_init_floor > 0, "
            f"got dt_min={low}, dt_max={high}, dt_init_floor={floor}"
        )
