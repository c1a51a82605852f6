"""Convolution kernels of diagonal and DPLR state spaces, and the state that such a convolution leaves."""

from longwave.ops.ssm_kernel.api import cauchy_kernel, vandermonde_kernel, vandermonde_state

__all__ = ["cauchy_kernel", "vandermonde_kernel", "vandermonde_state"]
