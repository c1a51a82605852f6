"""A series sampled at irregular times: how fast does it oscillate?

Each sequence holds values of sin(2 pi f t + phase) at random times t. Values alone say little of f, because nothing
tells how far apart they are. A mixer with a rate (s4d, s4, s5, lti) takes the time between samples as `dt`, and its
states decay and turn by just as much. With --no-times it is not told.

    python examples/irregular_series.py --steps 300 --mixer s4d
    python examples/irregular_series.py --steps 300 --no-times
"""

import argparse
import math

import torch
from torch import Tensor

from longwave.mixers import MIXERS
from longwave.models.features import Features
from longwave.models.heads import Regressor


def batch(size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Values (b, l, 1), the time that each token lasts (b, l), and the frequencies (b, 1), scaled to -1..1."""
    dt = torch.empty(size, length).exponential_(generator=generator).clamp(max=4)
    frequency = 0.02 + 0.1 * torch.rand(size, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(size, 1, generator=generator)
    values = (2 * math.pi * frequency * dt.cumsum(1) + phase).sin()
    return values[..., None], dt, (frequency - 0.07) / 0.05


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mixer", default="s4d")
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    encoder = Features.Config(
        d_input=1, d_model=32, layers=(MIXERS[options.mixer].Config(d_state=32, dt_min=0.01),) * 2
    )
    model = Regressor(Regressor.Config(encoder=encoder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    error = float("nan")
    for step in range(1, options.steps + 1):
        values, dt, target = batch(32, options.length, generator)
        loss = model.loss(values, target, dt=dt if options.times else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        error = loss.item() if step == 1 else 0.95 * error + 0.05 * loss.item()
        if step % 50 == 0 or step == options.steps:
            print(f"step {step}: mean squared error {error:.4f} (guessing the mean: {1 / 3:.4f})")
    return error


if __name__ == "__main__":
    main()
