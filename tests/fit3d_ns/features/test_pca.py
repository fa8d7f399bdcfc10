"""The shared feature basis: exact, streaming, deterministic; colours that are always showable."""

import pytest
import torch

from fit3d_ns.features.pca import ColorBasis, FeatureCovariance, PCABasis
from fit3d_ns.support.errors import UserError

CHANNELS = 24


def make_features(count: int = 700, offset: float = 3.0) -> torch.Tensor:
    """Features with falling variance per direction, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator))[0]
    scales = 2.0 ** -torch.arange(CHANNELS)
    return torch.randn(count, CHANNELS, generator=generator) * scales @ rotation + offset


def basis_of(features: torch.Tensor, dim: int, centred: bool = True, weights=None) -> PCABasis:
    covariance = FeatureCovariance(features.shape[1])
    covariance.add(features, weights)
    return covariance.basis(dim, centred)


def test_centred_basis_equals_svd_of_the_centred_features():
    features = make_features()
    basis = basis_of(features, 5)
    mean = features.double().mean(0)
    _, singular, vectors = torch.linalg.svd(features.double() - mean, full_matrices=False)
    torch.testing.assert_close(basis.mean.double(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(basis.explained_variance.double(), singular[:5] ** 2 / 700, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close((basis.components.double() * vectors[:5]).sum(1).abs(), torch.ones(5).double())
    assert basis.total_variance == pytest.approx(float((singular**2).sum() / 700), rel=1e-6)


def test_uncentred_basis_is_the_best_linear_one():
    features = make_features()
    basis = basis_of(features, 4, centred=False)
    assert torch.equal(basis.mean, torch.zeros(CHANNELS))
    left, singular, right = torch.linalg.svd(features.double(), full_matrices=False)
    best = (left[:, :4] * singular[:4]) @ right[:4]
    rebuilt = basis.project(features) @ basis.components
    torch.testing.assert_close(rebuilt.double(), best, atol=1e-4, rtol=1e-4)


def test_streaming_in_any_pieces_gives_the_same_basis():
    features = make_features()
    whole = basis_of(features, 6)
    covariance = FeatureCovariance(CHANNELS)
    for piece in features.split([1, 99, 300, 300]):
        covariance.add(piece)
    torch.testing.assert_close(covariance.basis(6).components, whole.components)


def test_more_rows_than_one_step_holds_are_all_counted():
    features = torch.zeros(40_000, 2)
    features[-1, 0] = 200.0
    assert basis_of(features, 1).total_variance == pytest.approx(200.0**2 / 40_000 * (1 - 1 / 40_000), rel=1e-6)


def test_weights_act_as_repetition():
    features = make_features(50)
    weights = torch.arange(50) % 3
    weighted = basis_of(features, 3, weights=weights.float())
    repeated = basis_of(features.repeat_interleave(weights, 0), 3)
    torch.testing.assert_close(weighted.components, repeated.components)
    torch.testing.assert_close(weighted.mean, repeated.mean)


def test_small_variance_on_a_large_mean_survives():
    features = make_features(offset=1000.0)
    basis = basis_of(features, 3)
    reference = basis_of(features.double() - features.double().mean(0), 3)
    torch.testing.assert_close(basis.components, reference.components, atol=1e-5, rtol=1e-5)


def test_signs_and_order_are_fixed():
    basis = basis_of(make_features(), CHANNELS)
    largest = basis.components.gather(1, basis.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    assert (basis.explained_variance.diff() <= 0).all()
    mirrored = basis_of(-make_features(), CHANNELS)
    torch.testing.assert_close(mirrored.components[:8], basis.components[:8])


def test_full_basis_reconstructs_exactly_and_half_precision_is_accepted():
    features = make_features()
    basis = basis_of(features, CHANNELS)
    rebuilt = basis.project(features) @ basis.components + basis.mean
    torch.testing.assert_close(rebuilt, features, atol=1e-4, rtol=1e-5)
    assert basis.explained_fraction == pytest.approx(1.0)
    assert basis.project(features.half().reshape(7, 10, 10, CHANNELS)).shape == (7, 10, 10, CHANNELS)
    assert basis.project(features.half()).dtype == torch.float32


def test_projection_commutes_with_any_mixing_of_features():
    """What lifting relies on: averaging coordinates equals the coordinates of averages, for weights that sum to 1."""
    features = make_features()
    basis = basis_of(features, 8)
    mixing = torch.rand(20, 700).softmax(1)
    torch.testing.assert_close(basis.project(mixing @ features), mixing @ basis.project(features), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [0, CHANNELS + 1])
def test_impossible_dimension_is_named(dim):
    with pytest.raises(UserError, match=f"not {dim}"):
        basis_of(make_features(), dim)


def test_empty_and_non_finite_features_are_named():
    with pytest.raises(UserError, match="no features"):
        FeatureCovariance(3).basis(1)
    with pytest.raises(UserError, match="NaN"):
        basis_of(torch.tensor([[1.0, float("nan"), 0.0]]), 1)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="features"):
        FeatureCovariance(3).add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="weights"):
        FeatureCovariance(3).add(torch.zeros(2, 3), torch.ones(3))


def test_colors_are_shared_between_maps():
    """The same feature has the same colour whichever map it stands in, and 98 % of the range is used."""
    features = make_features()
    colors = ColorBasis.fit(features)
    whole = colors.to_rgb(features)
    assert torch.equal(colors.to_rgb(features[:100].reshape(10, 10, CHANNELS)).reshape(100, 3), whole[:100])
    for share in ((whole == 0).float().mean(0), (whole == 1).float().mean(0)):
        assert (share <= 0.012).all() and (share >= 0.005).all()
    assert (whole.std(0) > 0.1).all()


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(50, CHANNELS),
        torch.full((50, CHANNELS), 7.3),
        torch.zeros(0, CHANNELS),
        torch.full((50, CHANNELS), float("nan")),
    ],
    ids=["zero", "constant", "none", "nan"],
)
def test_features_without_content_are_mid_grey(features):
    colors = ColorBasis.fit(features)
    shown = features if len(features) else torch.randn(5, CHANNELS)
    assert torch.equal(colors.to_rgb(shown), torch.full((len(shown), 3), 0.5))


def test_unrendered_and_broken_pixels_are_mid_grey_in_a_good_map():
    features = make_features(20)
    colors = ColorBasis.fit(features)
    features[3] = 0
    features[4, 2] = float("inf")
    features[5, 1] = float("nan")
    shown = colors.to_rgb(features)
    assert torch.equal(shown[3:6], torch.full((3, 3), 0.5))
    assert torch.isfinite(shown).all() and shown.min() >= 0 and shown.max() <= 1


def test_broken_rows_do_not_change_the_fit():
    features = make_features(200)
    broken = torch.cat([features, torch.full((3, CHANNELS), float("inf"))])
    torch.testing.assert_close(ColorBasis.fit(broken).to_rgb(features), ColorBasis.fit(features).to_rgb(features))


def test_missing_directions_are_grey_not_amplified_noise():
    along_one_line = torch.linspace(-1, 1, 101)[:, None] * torch.randn(CHANNELS) + 5
    shown = ColorBasis.fit(along_one_line).to_rgb(along_one_line)
    assert shown[:, 0].std() > 0.2
    assert torch.equal(shown[:, 1:], torch.full((101, 2), 0.5))


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_than_three_channels_still_give_colors(channels):
    features = torch.rand(100, channels) + 0.1
    shown = ColorBasis.fit(features).to_rgb(features)
    assert shown.shape == (100, 3)
    assert (shown[:, :channels].std(0) > 0.1).all()
    assert torch.equal(shown[:, channels:], torch.full((100, 3 - channels), 0.5))


def test_weightless_features_do_not_set_the_ranges():
    features = torch.cat([make_features(300), 1000 * torch.randn(30, CHANNELS)])
    weights = torch.cat([torch.ones(300), torch.zeros(30)])
    colors = ColorBasis.fit(features, weights)
    torch.testing.assert_close(colors.to_rgb(features[:300]), ColorBasis.fit(features[:300]).to_rgb(features[:300]))


def test_half_precision_is_accepted():
    features = make_features().half()
    shown = ColorBasis.fit(features).to_rgb(features)
    torch.testing.assert_close(shown, ColorBasis.fit(features.float()).to_rgb(features.float()))
    assert shown.dtype == torch.float32


@pytest.mark.gpu
def test_gpu_gives_the_basis_of_the_cpu():
    features = make_features()
    covariance = FeatureCovariance(CHANNELS, "cuda")
    covariance.add(features.cuda())
    basis = covariance.basis(6)
    assert basis.components.is_cuda
    torch.testing.assert_close(basis.components.cpu(), basis_of(features, 6).components, atol=1e-5, rtol=1e-4)
    shown = ColorBasis.fit(features.cuda()).to_rgb(features.cuda())
    torch.testing.assert_close(shown.cpu(), ColorBasis.fit(features).to_rgb(features), atol=1e-3, rtol=1e-3)
