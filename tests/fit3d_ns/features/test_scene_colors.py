"""Colours of a scene's features: the same as decoding first and colouring afterwards."""

import torch

from fit3d_ns.features.colors import SceneColors
from fit3d_ns.features.decoder import FeatureDecoder
from fit3d_ns.features.pca import ColorBasis


def _scene(width=24, count=500):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 6, generator=generator)
    opacities = torch.rand(count, generator=generator)
    decoder = FeatureDecoder(6, width, generator)
    return features, opacities, decoder


def test_a_render_is_coloured_as_if_it_had_been_decoded_to_the_backbones_width():
    features, opacities, decoder = _scene()
    colors = SceneColors.fit(features, opacities, decoder.weight)
    low = 4 * torch.randn(6, 9, 12, generator=torch.Generator().manual_seed(1))
    low[:, :, :4] = 0  # nothing rendered there
    weight = decoder.weight.detach()
    basis = ColorBasis.fit(features @ weight.sum((2, 3)).T, opacities)
    expected = basis.to_rgb(decoder(low).detach().permute(1, 2, 0))
    torch.testing.assert_close(colors.of_render(low), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1
    assert torch.equal(colors.of_render(low)[:, :3], torch.full((9, 3, 3), 0.5))


def test_gaussians_have_the_colour_of_a_surface_that_they_cover():
    features, opacities, decoder = _scene()
    colors = SceneColors.fit(features, opacities, decoder.weight)
    surface = features[7][:, None, None].expand(6, 5, 5)
    torch.testing.assert_close(colors.of_render(surface)[2, 2], colors.of_gaussians(features)[7], atol=1e-5, rtol=0)


def test_gaussians_without_a_feature_are_grey_and_have_no_say_in_the_basis():
    features, opacities, decoder = _scene()
    colors = SceneColors.fit(features, opacities, decoder.weight)
    unseen = torch.cat([features, torch.zeros(400, 6)])
    both = SceneColors.fit(unseen, torch.cat([opacities, torch.ones(400)]), decoder.weight)
    torch.testing.assert_close(both.kernel, colors.kernel)
    torch.testing.assert_close(both.bias, colors.bias)
    assert torch.equal(both.of_gaussians(unseen)[500:], torch.full((400, 3), 0.5))


def test_no_feature_at_all_one_direction_and_broken_values_stay_finite():
    features, opacities, decoder = _scene()
    zero = SceneColors.fit(torch.zeros_like(features), opacities, decoder.weight)
    assert torch.equal(zero.of_gaussians(features), torch.full((500, 3), 0.5))
    line = SceneColors.fit(torch.arange(1.0, 501)[:, None] * features[:1], opacities, decoder.weight)
    shown = line.of_gaussians(torch.tensor([1.0, 250.0, 500.0])[:, None] * features[:1])
    assert shown[:, 0].diff().abs().min() > 0.3
    assert torch.equal(shown[:, 1:], torch.full((3, 2), 0.5))
    features[3] = torch.nan
    features[4] = torch.inf
    broken = SceneColors.fit(features, opacities, decoder.weight).of_gaussians(features)
    assert torch.equal(broken[3:5], torch.full((2, 3), 0.5))
    assert broken.min() >= 0 and broken.max() <= 1


def test_a_backbone_of_two_channels_leaves_one_colour_constant():
    features, opacities, _ = _scene()
    decoder = FeatureDecoder(6, 2, torch.Generator().manual_seed(3))
    shown = SceneColors.fit(features, opacities, decoder.weight).of_gaussians(features)
    assert shown[:, :2].std(0).min() > 0.1
    assert torch.equal(shown[:, 2], torch.full((500,), 0.5))
