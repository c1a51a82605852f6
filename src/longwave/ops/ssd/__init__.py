"""State space duality (Mamba-2): a scalar decay per head, with the state carried in and out."""

from longwave.ops.ssd.api import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
