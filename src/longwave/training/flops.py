"""How much arithmetic training takes, and how much of it a device can do."""

import torch

from longwave.models.token_model import TokenModel

PEAK_BFLOAT16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 FLOP/s with float32 accumulation, from the maker's data sheets (SXM forms), by part of the name."""


def flops_per_token(model: TokenModel, length: int) -> float:
    """Operations that training spends on a token in sequences of `length`: forward, and twice that backward."""
    return 3 * model.flops(length) / length


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The device's data-sheet peak for `dtype`, None where it is not known (every CPU, and float32)."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BFLOAT16.items() if part in name), None)
