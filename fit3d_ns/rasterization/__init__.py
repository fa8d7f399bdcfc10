"""Rasterisation of Gaussians: `rasterize`, with gsplat on CUDA and a backend of the same rules on the CPU."""

from fit3d_ns.rasterization.interface import check_backend, rasterize
from fit3d_ns.rasterization.projection import gaussian_axes

__all__ = ["check_backend", "gaussian_axes", "rasterize"]
