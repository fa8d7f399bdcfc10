"""The space in which features are compared: what the decoder makes of a Gaussian."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features.decoder import FeatureDecoder


@dataclass(frozen=True)
class FeatureSpace:
    """Low-dimensional features as the decoder sees them on an even surface.

    Where neighbouring pixels show the same feature, the 3x3 convolution is one matrix, the sum of its nine taps. With
    that matrix as ``Q R`` (Q orthonormal), ``R x`` has the lengths and angles of decoded features in at most D numbers
    instead of C.

    Attributes:
        directions: [C, K] orthonormal columns Q, with K the smaller one of C and D.
        matrix: [K, D], R.
    """

    directions: Float[Tensor, "C K"]
    matrix: Float[Tensor, "K D"]

    @classmethod
    def of(cls, decoder: FeatureDecoder) -> "FeatureSpace":
        """Returns the space of a decoder, on its device.

        Args:
            decoder: From D to C channels.
        """
        directions, matrix = torch.linalg.qr(decoder.weight.detach().sum((2, 3)))
        return cls(directions, matrix)

    def coordinates(self, low: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape K"]:
        """Returns coordinates of low-dimensional features.

        Args:
            low: [.., D].
        """
        return low.detach() @ self.matrix.T

    def decode(self, coordinates: Float[Tensor, "*shape K"]) -> Float[Tensor, "*shape C"]:
        """Returns features of the backbone's width.

        Args:
            coordinates: [.., K].
        """
        return coordinates @ self.directions.T

    def narrow(self, decoded: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape K"]:
        """Returns coordinates of features of the backbone's width, as far as this space holds them.

        Args:
            decoded: [.., C].
        """
        return decoded @ self.directions
