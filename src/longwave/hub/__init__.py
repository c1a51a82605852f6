"""Weights to and from other people's formats. A format is one module, described by `hub.family.Family`."""

from longwave.hub import (
    bamba,
    falcon_h1,
    falcon_mamba,
    granitemoehybrid,
    h3,
    hyena,
    jamba,
    mamba,
    mamba2,
    nemotron_h,
    state_spaces,
    stripedhyena,
    zamba2,
)
from longwave.hub.family import Family

FORMATS: dict[str, Family] = {
    "mamba": mamba,
    "mamba2": mamba2,
    "falcon_mamba": falcon_mamba,
    "jamba": jamba,
    "bamba": bamba,
    "granitemoehybrid": granitemoehybrid,
    "falcon_h1": falcon_h1,
    "nemotron_h": nemotron_h,
    "zamba2": zamba2,
    "state_spaces": state_spaces,
    "h3": h3,
    "hyena": hyena,
    "stripedhyena": stripedhyena,
}
