"""What of a photo counts, patch by patch, where a mask, transparency, or both leave parts out."""

import pytest
import torch

from fit3d_ns.data.photos.masks import composite_on_black, patch_weights

GRID = (2, 2)


def photo(alpha: torch.Tensor | None, eight_bits: bool) -> torch.Tensor:
    """[4, 6, 3 or 4] white, with an alpha in [0, 1]."""
    image = torch.ones(4, 6, 3)
    image = image if alpha is None else torch.cat([image, alpha[..., None]], dim=2)
    return (image * 255).round().to(torch.uint8) if eight_bits else image


LEFT = torch.ones(4, 6)
LEFT[:, 3:] = 0
TOP = torch.ones(4, 6, dtype=torch.bool)
TOP[3:] = False


@pytest.mark.parametrize("eight_bits", [True, False])
def test_mask_and_transparency_count_together(eight_bits):
    both = patch_weights({"image": photo(LEFT, eight_bits), "mask": TOP[..., None]}, GRID)
    assert both is not None
    torch.testing.assert_close(both, torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
    transparent = patch_weights({"image": photo(LEFT, eight_bits)}, GRID)
    assert transparent is not None
    torch.testing.assert_close(transparent, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    masked = patch_weights({"image": photo(None, eight_bits), "mask": TOP[..., None]}, GRID)
    assert masked is not None
    torch.testing.assert_close(masked, torch.tensor([[1.0, 1.0], [0.5, 0.5]]))
    assert patch_weights({"image": photo(None, eight_bits)}, GRID) is None


@pytest.mark.parametrize("eight_bits", [True, False])
def test_the_teacher_sees_transparent_parts_black(eight_bits):
    seen = composite_on_black(photo(LEFT / 2, eight_bits))
    assert seen.dtype == torch.uint8 and seen.shape == (4, 6, 3)
    assert seen[:, :3].unique().tolist() == [128] and seen[:, 3:].unique().tolist() == [0]
    assert composite_on_black(photo(None, eight_bits)).unique().tolist() == [255]
