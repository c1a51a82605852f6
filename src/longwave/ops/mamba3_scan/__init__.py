"""The scan of Mamba-3: trapezoidal rule, rotated B and C, one or more ranks; the state is carried in and out."""

from longwave.ops.mamba3_scan.api import Mamba3ScanState, mamba3_scan, mamba3_scan_step

__all__ = ["Mamba3ScanState", "mamba3_scan", "mamba3_scan_step"]
