"""An SSM in place of a GRU: the adding problem (Hochreiter and Schmidhuber 1997, section 5.4).

Each sequence has two features: random numbers, and a mark at two places. The target is the sum of the two marked
numbers. Guessing the mean gives an error of 1/6.

    python examples/adding_problem.py --length 200 --steps 400 --mixer mamba2
"""

import argparse

import torch
from torch import Tensor, nn

import longwave


def batch(size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (b, l, 2) and targets (b,)."""
    numbers = torch.rand(size, length, generator=generator)
    places = torch.rand(size, length, generator=generator).topk(2).indices
    marks = torch.zeros(size, length).scatter(1, places, 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(1)


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--mixer", default="mamba2")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    ssm = longwave.SSM(2, 32, num_layers=2, batch_first=True, mixer=options.mixer)
    head = nn.Linear(32, 1)
    optimizer = torch.optim.AdamW([*ssm.parameters(), *head.parameters()], lr=4e-3)
    error = float("nan")
    for step in range(1, options.steps + 1):
        x, target = batch(32, options.length, generator)
        y, _ = ssm(x)
        loss = (head(y[:, -1])[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        error = loss.item() if step == 1 else 0.95 * error + 0.05 * loss.item()
        if step % 50 == 0 or step == options.steps:
            print(f"step {step}: mean squared error {error:.4f}")
    return error


if __name__ == "__main__":
    main()
