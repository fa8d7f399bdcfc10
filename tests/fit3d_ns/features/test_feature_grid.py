"""The patch-grid rules against the plain formulation: decode everything, then sample."""

import pytest
import torch
import torch.nn.functional as F

from fit3d_ns.features.decoder import FeatureDecoder, decode_patches
from fit3d_ns.features.grid import FEATURE_GRIDS, FeatureGrid, sample_teacher, sampling_offset
from fit3d_ns.support.errors import UserError


@pytest.fixture
def decoder() -> FeatureDecoder:
    return FeatureDecoder(5, 7, torch.Generator().manual_seed(3)).double()


def test_fast_windows_equal_decoding_everything_then_averaging(decoder):
    grid = (4, 6)
    low = torch.randn(5, *FEATURE_GRIDS["fast"].render_size((61, 91), grid), dtype=torch.float64)
    expected = F.avg_pool2d(decoder(low), 4)
    torch.testing.assert_close(decode_patches(low, decoder.weight, FEATURE_GRIDS["fast"], grid), expected)


@pytest.mark.parametrize("image_size", [(56, 84), (61, 91)])
def test_paper_windows_equal_decoding_everything_then_bilinear_resizing(decoder, image_size):
    grid = (4, 6)
    low = torch.randn(5, *image_size, dtype=torch.float64)
    expected = F.interpolate(decoder(low)[None], size=grid, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(decode_patches(low, decoder.weight, FEATURE_GRIDS["paper"], grid), expected)


@torch.no_grad()
def test_moving_points_have_the_papers_full_resolution_loss_as_their_mean(decoder):
    """FiT3D's loss: every pixel, teacher resized bilinearly to the image."""
    torch.manual_seed(0)
    grid, image_size = (4, 5), (48, 60)
    low = F.interpolate(torch.randn(1, 5, 8, 10, dtype=torch.float64), size=image_size, mode="bilinear")[0]
    teacher = torch.randn(7, *grid, dtype=torch.float64)
    resized = F.interpolate(teacher[None], size=image_size, mode="bilinear", align_corners=False)[0]
    everywhere = (decoder(low) - resized).abs().mean()
    samples = []
    for step in range(400):
        offset = sampling_offset(step)
        decoded = decode_patches(low, decoder.weight, FEATURE_GRIDS["paper"], grid, offset)
        samples.append((decoded - sample_teacher(teacher, offset)).abs().mean())
    assert torch.stack(samples).mean() == pytest.approx(everywhere.item(), rel=0.01)
    fixed = (decode_patches(low, decoder.weight, FEATURE_GRIDS["paper"], grid) - teacher).abs().mean()
    assert abs(fixed / everywhere - 1) > 0.02  # one fixed point per patch is another loss


def test_sampling_offset_spreads_over_the_patch():
    offsets = torch.tensor([sampling_offset(step) for step in range(256)])
    cells = ((offsets + 0.5) * 8).long()
    assert offsets.min() >= -0.5 and offsets.max() < 0.5
    assert len({tuple(cell.tolist()) for cell in cells}) == 64


@pytest.mark.parametrize("name", ["paper", "fast"])
def test_rule_survives_storage(name):
    rule = FEATURE_GRIDS[name]
    assert FeatureGrid.from_dict(rule.to_dict()) == rule


def test_rule_of_another_version_is_refused():
    with pytest.raises(UserError, match="stored feature grid"):
        FeatureGrid.from_dict({"name": "fast", "colour": 3})
