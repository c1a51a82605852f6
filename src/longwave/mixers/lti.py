"""The vanilla state space: a dense, linear, time-invariant system for each channel. The first rung of S4's ladder."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longwave.errors import UsageError
from longwave.mixers.dense_channel import DenseChannel
from longwave.mixers.per_channel import PerChannelConfig
from longwave.mixers.ssm_parameters import float32_parameter
from longwave.mixers.time_invariant import SSMState
from longwave.ops.discretize import METHODS, Method
from longwave.ops.hippo import Measure, hippo

LTIState = SSMState  # ssm (b, d, n)


class LTI(DenseChannel):
    """A dense state space for each channel (Gu et al. 2021, arXiv:2110.13985; Gu et al. 2022, arXiv:2111.00396, 2.1):

        x' = A x + B u;  y = C x + D u;  out = GLU(W gelu(y) + b)

    discretised by zero-order hold, the bilinear rule or Euler's. Parameters: inv_dt (d,), A (n_ssm, n, n), B (n_ssm,
    n), C (d, n), D (d,), output_linear (2 d, d); all but the last stay in float32. Initialised as S4 before it is made
    fast: A and B are HiPPO's, C is normal.

    Nothing keeps a learned A stable. Euler's rule is stable for dt |A| < 2 alone, while HiPPO's A has eigenvalues down
    to -n: choose dt_max below 2 / n.
    """

    float32_parameters = ("inv_dt", "A", "B", "C", "D")
    slow_parameters = ("inv_dt", "A", "B")

    @dataclass(frozen=True, kw_only=True)
    class Config(PerChannelConfig):
        """`init`: HiPPO's measure. `n_ssm` = 1, one A for all channels, saves memory: A has n_ssm n^2 entries."""

        kind: ClassVar[str] = "lti"
        init: Measure = "legs"
        discretization: Method = "zoh"

        def __post_init__(self):
            super().__post_init__()
            if self.init not in ("legs", "legt"):
                raise UsageError(f"lti: init must be 'legs' or 'legt', got {self.init!r}")
            if self.discretization not in METHODS:
                raise UsageError(
                    f"lti: discretization must be one of {', '.join(METHODS)}, got {self.discretization!r}"
                )

    def __init__(self, d_model: int, config: Config | None = None):
        config = config or self.Config()
        super().__init__(d_model, config)
        n = config.d_state
        self.A = float32_parameter(self.n_ssm, n, n)
        self.B = float32_parameter(self.n_ssm, n)
        self.C = float32_parameter(d_model, n)
        self.state_shape = (d_model, n)
        self.reset_parameters()

    def _reset_system(self) -> None:
        A, B = hippo(self.config.init, self.config.d_state)
        self.A.copy_(A)
        self.B.copy_(B)
        self.C.normal_()

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        return *self._times_steps(self._wide(self.A), self._wide(self.B)), self._wide(self.C)

    def flops(self, length: int) -> int:
        """The system counts as its recurrence: Abar x 2 n^2, + B u 2 n, C x 2 n for each channel."""
        n = self.config.d_state
        return length * self._flops(2 * n * n + 4 * n)
