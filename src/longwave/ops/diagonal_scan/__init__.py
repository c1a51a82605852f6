"""A diagonal complex linear recurrence whose step size may differ from token to token."""

from longwave.ops.diagonal_scan.api import diagonal_scan, diagonal_scan_step

__all__ = ["diagonal_scan", "diagonal_scan_step"]
