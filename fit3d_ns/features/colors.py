"""The colours of a scene's features: one basis for its Gaussians and for whatever is rendered of them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.features.pca import ColorBasis

_SAMPLED_GAUSSIANS = 50_000
"""Gaussians that the basis is taken from, at most; more do not change it visibly."""


@dataclass(frozen=True)
class SceneColors:
    """Red, green and blue for decoded features.

    Decoding is a convolution and the choice of colours an affine map behind it, so both together are one convolution
    to three channels, and no map of the backbone's width is ever made.

    Attributes:
        kernel: [3, D, 3, 3], from rendered low-dimensional features to colours.
        bias: [3], added to them.
        basis: The same colours for features of the backbone's width.
    """

    kernel: Float[Tensor, "3 D 3 3"]
    bias: Float[Tensor, "3"]
    basis: ColorBasis

    @classmethod
    @torch.no_grad()
    def fit(
        cls, features: Float[Tensor, "N D"], opacities: Float[Tensor, "N"], decoder: Float[Tensor, "C D 3 3"]
    ) -> "SceneColors":
        """Takes the first three principal components of the Gaussians' decoded features.

        No camera has a part in it, so the same run has the same colours in every view and every command.

        Args:
            features: [N, D] of all Gaussians, in the order of the checkpoint.
            opacities: [N] how much each counts, in [0, 1]. Gaussians without a feature (all zero) do not count.
            decoder: [C, D, 3, 3] kernel of the scene's decoder.

        Returns:
            Colours that are the same in every view.
        """
        count = len(features)
        rows = torch.linspace(0, max(count - 1, 0), min(count, _SAMPLED_GAUSSIANS), device=features.device).long()
        sample, decoder = features.detach()[rows].float(), decoder.detach().float()
        weights = opacities.detach()[rows].float() * (sample != 0).any(1)
        return cls.of(ColorBasis.fit(sample @ decoder.sum((2, 3)).T, weights), decoder)

    @classmethod
    @torch.no_grad()
    def of(cls, colors: ColorBasis, decoder: Float[Tensor, "C D 3 3"]) -> "SceneColors":
        """Puts a decoder before colours that were chosen already.

        Args:
            colors: For features of the backbone's width.
            decoder: [C, D, 3, 3] kernel of the scene's decoder.

        Returns:
            The same colours, for features before the decoder.
        """
        decoder = decoder.detach().float()
        span = colors.high - colors.low
        gain = torch.where(span > 0, 1 / span.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        directions, mean = colors.basis.components, colors.basis.mean
        directions = F.pad(directions, (0, 0, 0, 3 - len(directions)))
        kernel = torch.einsum("kc,cdyx->kdyx", gain[:, None] * directions, decoder)
        bias = torch.where(span > 0, -gain * (directions @ mean + colors.low), 0.5)
        return cls(kernel, bias, colors)

    @torch.no_grad()
    def of_gaussians(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N 3"]:
        """Returns the colours that surfaces covered evenly by one Gaussian's feature are shown in.

        Args:
            features: [N, D] of the Gaussians.

        Returns:
            float32 in [0, 1], finite always; mid-grey without a feature.
        """
        features = features.detach().float()
        return _shade(features @ self.kernel.sum((2, 3)).T + self.bias, (features != 0).any(1))

    @torch.no_grad()
    def of_render(self, low: Float[Tensor, "D H W"]) -> Float[Tensor, "H W 3"]:
        """Decodes and colours every pixel of a rendered map.

        Args:
            low: [D, H, W] blended features, as `fit3d_ns.features.rendering.render_features` returns them.

        Returns:
            float32 in [0, 1], finite always; mid-grey where nothing was rendered.
        """
        low = low.detach().float()
        colors = F.conv2d(low, self.kernel, self.bias, padding=1).permute(1, 2, 0)
        covered = F.max_pool2d((low != 0).any(0, keepdim=True).float(), 3, stride=1, padding=1)[0] > 0
        return _shade(colors, covered)

    def to(self, device: torch.device | str) -> "SceneColors":
        """Returns the same colours with their tensors on ``device``.

        Args:
            device: A CPU or CUDA device.
        """
        return SceneColors(self.kernel.to(device), self.bias.to(device), self.basis.to(device))


def _shade(colors: Float[Tensor, "*shape 3"], known: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape 3"]:
    known = known & torch.isfinite(colors).all(-1)
    return torch.where(known[..., None], colors, 0.5).clamp(0, 1)
