"""Linear heads on assembled features."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.processes import SyncedBatchNorm


class Fusion(nn.Conv2d):
    """The learned layer 2C -> C of the assembly `linear`, trained with the head behind it."""

    def __init__(self, width: int, bias: bool) -> None:
        """Makes the layer, for ``width`` = 2C; a bias is of no use before a batch norm.

        Args:
            width: 2C, channels of both backbones together.
            bias: Of no use before a batch norm.
        """
        super().__init__(width, width // 2, 1, bias=bias)


class SegmentationHead(nn.Module):
    """Batch norm and a 1x1 convolution (DINOv2's linear head; its reference calls it BNHead)."""

    def __init__(self, width: int, num_classes: int, fuse: bool = False) -> None:
        """Makes the head.

        Args:
            width: Channels of the patch tokens.
            num_classes: Classes K.
            fuse: Whether the tokens are concatenated ones that a learned layer halves first.
        """
        super().__init__()
        self.fusion = Fusion(width, bias=False) if fuse else None
        width = width // 2 if fuse else width
        self.norm = SyncedBatchNorm(width)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, features: BackboneOutput) -> Float[Tensor, "B K h w"]:
        """Returns logits on the patch grid.

        Args:
            features: Patch tokens [B, C, h, w].
        """
        tokens = features.patch_tokens if self.fusion is None else self.fusion(features.patch_tokens)
        return self.classifier(self.norm(tokens))

    def many(
        self, heads: Sequence["SegmentationHead"], parameters: dict[str, Tensor], features: BackboneOutput
    ) -> list[Float[Tensor, "B K h w"]]:
        """See `StackedHead.many`: tokens are normalized once, and each norm's scale and shift join its head.

        Args:
            heads: This one first.
            parameters: Of all of them, [n, ...], by name.
            features: What they see.

        Returns:
            Logits of each.
        """
        if self.fusion is not None:
            return _each(heads, parameters, features)
        weight = parameters["classifier.weight"][..., 0, 0]  # [n, K, C]
        bias = parameters["classifier.bias"] + torch.einsum("nkc,nc->nk", weight, parameters["norm.bias"])
        tokens = self.norm.standardize(features.patch_tokens)
        return _joint_convolution(tokens, weight * parameters["norm.weight"][:, None], bias)


class TokenAndClassHead(nn.Module):
    """A 1x1 convolution on patch tokens to each of which the class token is appended.

    The class token's part is computed once per image: the convolution of a constant map is a constant.
    """

    def __init__(self, width: int, cls_width: int, outputs: int, fuse: bool = False) -> None:
        """Makes the head.

        Args:
            width: Channels of the patch tokens.
            cls_width: Channels of the class token, 0 if there is none.
            outputs: Channels K of the result.
            fuse: As for `SegmentationHead`.
        """
        super().__init__()
        self.fusion = Fusion(width, bias=True) if fuse else None
        self.width = width // 2 if fuse else width
        self.convolution = nn.Conv2d(self.width + cls_width, outputs, 1)

    def forward(self, features: BackboneOutput) -> Float[Tensor, "B K h w"]:
        """Returns the linear map on the patch grid.

        Args:
            features: Patch tokens [B, C, h, w] and, where there is one, the class token [B, C].
        """
        tokens = features.patch_tokens if self.fusion is None else self.fusion(features.patch_tokens)
        weight = self.convolution.weight
        result = F.conv2d(tokens, weight[:, : self.width], self.convolution.bias)
        cls: Tensor | None = features.cls
        if cls is not None and weight.shape[1] > self.width:
            result = result + F.linear(cls, weight[:, self.width :, 0, 0])[:, :, None, None]
        return result

    def many(
        self, heads: Sequence["TokenAndClassHead"], parameters: dict[str, Tensor], features: BackboneOutput
    ) -> list[Float[Tensor, "B K h w"]]:
        """See `StackedHead.many`.

        Args:
            heads: This one first.
            parameters: Of all of them, [n, ...], by name.
            features: What they see.

        Returns:
            The linear map of each.
        """
        if self.fusion is not None:
            return _each(heads, parameters, features)
        weight = parameters["convolution.weight"][..., 0, 0]  # [n, K, C + c]
        outputs = _joint_convolution(features.patch_tokens, weight[..., : self.width], parameters["convolution.bias"])
        if features.cls is None or weight.shape[2] == self.width:
            return outputs
        added = torch.einsum("nkc,bc->nbk", weight[..., self.width :], features.cls)[..., None, None]
        return [output + one for output, one in zip(outputs, added)]


def _each(
    heads: Sequence[nn.Module], parameters: dict[str, Tensor], features: BackboneOutput
) -> list[Float[Tensor, "B K h w"]]:
    """Runs heads one after the other, each with its own of the parameters [n, ...]."""
    own = [dict(zip(parameters, values)) for values in zip(*parameters.values())]
    return [functional_call(head, values, (features,)) for head, values in zip(heads, own)]


def _joint_convolution(
    tokens: Float[Tensor, "B C h w"], weight: Float[Tensor, "n K C"], bias: Float[Tensor, "n K"]
) -> list[Float[Tensor, "B K h w"]]:
    """Applies n linear maps to the same tokens, as one."""
    result = F.conv2d(tokens, weight.flatten(0, 1)[..., None, None], bias.flatten())
    return list(result.chunk(len(bias), 1))


def expected_depth(
    logits: Float[Tensor, "B K *place"], min_depth: float, max_depth: float
) -> Float[Tensor, "B 1 *place"]:
    """Turns logits of evenly spaced depths into a depth, AdaBins' linear way: ReLU, plus .1, normalised, expectation.

    Args:
        logits: One channel per bin.
        min_depth: Depth of the first bin, metres.
        max_depth: Depth of the last, metres.

    Returns:
        Metres.
    """
    bins = torch.linspace(min_depth, max_depth, logits.shape[1], device=logits.device, dtype=logits.dtype)
    weights = logits.relu() + 0.1
    return torch.einsum("bk...,k->b...", weights, bins)[:, None] / weights.sum(1, keepdim=True)


def sample_map(values: Float[Tensor, "B K h w"], positions: Float[Tensor, "B P 2"]) -> Float[Tensor, "B K P"]:
    """Reads maps between their centres as bilinear resizing (``align_corners=False``) would.

    Args:
        values: Maps.
        positions: (x, y) as shares of width and height, in [0, 1].

    Returns:
        Values at the positions.
    """
    grid = positions[:, None] * 2 - 1
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]


def resize_maps(maps: Float[Tensor, "B K h w"], size: tuple[int, ...]) -> Float[Tensor, "B K H W"]:
    """Resizes maps bilinearly (half-pixel centres, no antialiasing), as torch's ``interpolate`` does.

    By two matrix products instead: the backward pass of ``interpolate`` adds in no fixed order on CUDA, so that
    repeated runs differ, and is slower.

    Args:
        maps: To resize.
        size: (H, W).

    Returns:
        The maps at that size, equal to torch's to rounding.
    """
    height, width = maps.shape[-2:]
    if (height, width) == tuple(size):
        return maps
    rows = _weights(height, size[0], maps.device, maps.dtype)
    columns = _weights(width, size[1], maps.device, maps.dtype)
    return rows @ (maps @ columns.T)


@lru_cache(maxsize=64)
def _weights(source: int, target: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "target source"]:
    """What each source cell contributes to each target cell along one axis."""
    identity = torch.eye(source, dtype=dtype)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T.contiguous().to(device)
