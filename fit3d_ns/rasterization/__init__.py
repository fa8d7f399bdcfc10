"""Rasterisation of Gaussians: `rasterize`, with gsplat on CUDA and a backend of the same rules on the CPU."""

from fit3d_ns.rasterization.interface import rasterize

__all__ = ["rasterize"]
