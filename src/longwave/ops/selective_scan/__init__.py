"""Mamba-1's selective scan: a diagonal linear recurrence whose step size, B and C depend on the input."""

from longwave.ops.selective_scan.api import selective_scan, selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
