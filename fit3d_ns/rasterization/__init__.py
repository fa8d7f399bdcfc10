"""Rasterisation of Gaussians: `rasterize`, with gsplat on CUDA and a backend of the same rules on the CPU."""

from fit3d_ns.rasterization.interface import check_backend, rasterize

__all__ = ["check_backend", "rasterize"]
