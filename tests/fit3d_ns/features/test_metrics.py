"""Feature fidelity and view consistency, on a room whose every depth is known in closed form."""

import math

import pytest
import torch

from fit3d_ns.features.correspondences import Correspondences, SurfaceView, correspondences
from fit3d_ns.features.metrics import MatchedViews, choose_pairs, feature_cosine, feature_l1, match_rate

ROOM = torch.tensor([3.0, 2.0, 2.5], dtype=torch.float64)
"""Half extents of a box room around the origin; y points down."""
BALL = (torch.tensor([0.3, 0.4, 0.8], dtype=torch.float64), 0.5)
"""Centre and radius of a sphere that hides parts of the walls."""


def look_at(eye, target) -> torch.Tensor:
    """World to camera, OpenCV axes."""
    eye, target = (torch.tensor(point, dtype=torch.float64) for point in (eye, target))
    forward = torch.nn.functional.normalize(target - eye, dim=0)
    right = torch.nn.functional.normalize(
        torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), forward), dim=0
    )
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3], viewmat[:3, 3] = rotation, -rotation @ eye
    return viewmat


def cast(viewmat, K, pixels, *, ball: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """z-depths and surface points of rays through ``pixels`` [..., 2] from inside the room."""
    rotation = viewmat[:3, :3]
    eye = -rotation.T @ viewmat[:3, 3]
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)
    rays = homogeneous @ torch.linalg.inv(K).T @ rotation  # z of the camera is 1, so the ray parameter is the z-depth
    depth = ((torch.where(rays > 0, ROOM, -ROOM) - eye) / rays).amin(-1)
    if ball:
        centre, radius = BALL
        a, b, c = (rays**2).sum(-1), (rays * (eye - centre)).sum(-1), ((eye - centre) ** 2).sum() - radius**2
        root = b**2 - a * c
        hit = (-b - root.clamp_min(0).sqrt()) / a
        depth = torch.where((root > 0) & (hit > 0) & (hit < depth), hit, depth)
    return depth, eye + rays * depth[..., None]


def pixel_centres(height: int, width: int, scale_y: float = 1.0, scale_x: float = 1.0) -> torch.Tensor:
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5, torch.arange(width, dtype=torch.float64) + 0.5, indexing="ij"
    )
    return torch.stack([column * scale_x, row * scale_y], -1)


def make_view(eye, target, *, width: int = 224, height: int = 168, ball: bool = True) -> SurfaceView:
    K = torch.tensor([[150.0, 0, width / 2], [0, 150.0, height / 2], [0, 0, 1]], dtype=torch.float64)
    viewmat = look_at(eye, target)
    depth, _ = cast(viewmat, K, pixel_centres(height, width), ball=ball)
    return SurfaceView(viewmat, K, width, height, depth.float())


def patch_points(view: SurfaceView, grid, ball: bool = True) -> torch.Tensor:
    """[h, w, 3] surface points at patch centres, ray-cast rather than read from the depth map."""
    centres = pixel_centres(grid[0], grid[1], view.height / grid[0], view.width / grid[1])
    return cast(view.viewmat, view.K, centres, ball=ball)[1]


def embed(points: torch.Tensor) -> torch.Tensor:
    """[C, h, w] features whose cosine falls smoothly with the distance of [h, w, K] points."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 4 * torch.randn(points.shape[-1], 256, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(256, generator=generator, dtype=torch.float64)
    return torch.cos(points @ frequencies + phases).permute(2, 0, 1).float()


EYES = [(-1.5, -0.3, -1.8), (-0.6, 0.0, -1.6), (0.4, -0.5, -1.7), (1.3, 0.2, -1.5), (2.0, -0.2, -1.0)]
TARGETS = [(0.8, 0.1, 2.0), (-0.5, 0.4, 2.0), (0.4, 0.0, 2.0), (0.9, 0.4, 2.0), (-0.5, -0.2, 2.0)]
GRIDS = [(12, 16), (12, 16), (16, 12), (12, 16), (15, 20)]


@pytest.fixture(scope="module")
def room() -> list[SurfaceView]:
    """Five views of one wall and the ball; the third is portrait, the last has a finer grid."""
    sizes = [(168, 224), (168, 224), (224, 168), (168, 224), (168, 224)]
    return [make_view(eye, target, width=w, height=h) for eye, target, (h, w) in zip(EYES, TARGETS, sizes)]


def surface_maps(views) -> list[torch.Tensor]:
    return [embed(patch_points(view, grid)) for view, grid in zip(views, GRIDS)]


# -- fidelity -----------------------------------------------------------------------------------------------------


def test_l1_and_cosine_equal_their_definitions():
    pred, teacher = torch.randn(7, 3, 4), torch.randn(7, 3, 4)
    assert feature_l1(pred, teacher).item() == pytest.approx((pred - teacher).abs().mean().item(), rel=1e-6)
    expected = [
        torch.dot(pred[:, i, j], teacher[:, i, j]) / pred[:, i, j].norm() / teacher[:, i, j].norm()
        for i in range(3)
        for j in range(4)
    ]
    assert feature_cosine(pred, teacher).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert feature_cosine(pred, 3 * pred).item() == pytest.approx(1.0, abs=1e-6)


def test_mask_leaves_patches_out_whatever_they_hold():
    pred, teacher = torch.randn(7, 3, 4), torch.randn(7, 3, 4)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 1:3] = True
    for metric in (feature_l1, feature_cosine):
        expected = metric(pred[:, 1:2, 1:3], teacher[:, 1:2, 1:3])
        spoiled = pred.clone()
        spoiled[:, ~mask] = float("nan")
        torch.testing.assert_close(metric(spoiled, teacher, mask), expected)
        assert torch.isnan(metric(pred, teacher, torch.zeros(3, 4)))


def test_fractional_mask_weighs_patches():
    pred, teacher = torch.tensor([[[1.0, 4.0]]]), torch.zeros(1, 1, 2)
    assert feature_l1(pred, teacher, torch.tensor([[1.0, 0.5]])).item() == pytest.approx((1 + 0.5 * 4) / 1.5)


def test_half_precision_is_computed_in_float32():
    pred, teacher = torch.full((64, 2, 2), 300.0).half(), torch.full((64, 2, 2), -300.0).half()
    assert feature_l1(pred, teacher).item() == 600
    assert feature_cosine(pred, teacher).item() == pytest.approx(-1)
    assert feature_l1(pred, teacher).dtype == torch.float32


def test_maps_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        feature_l1(torch.zeros(3, 2, 2), torch.zeros(3, 2, 3))
    with pytest.raises(ValueError, match="mask"):
        feature_cosine(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.ones(4, 4))


# -- correspondences ----------------------------------------------------------------------------------------------


def test_identity_maps_patch_centres_to_themselves(room):
    view, grid = room[0], (12, 16)
    points = correspondences(view, view, grid, grid)
    expected = torch.stack([points.patch_index % 16, points.patch_index // 16], -1) + 0.5
    torch.testing.assert_close(points.target, expected, atol=1e-4, rtol=0)
    assert len(points) > 0.9 * 12 * 16


def test_targets_are_exact_on_ray_cast_points(room):
    """Every target is where the true surface point projects: half a patch (or half a pixel) off would show."""
    for a, b in [(0, 1), (1, 2), (2, 0), (3, 4)]:
        points = correspondences(room[a], room[b], GRIDS[a], GRIDS[b])
        surface = patch_points(room[a], GRIDS[a]).reshape(-1, 3)[points.patch_index]
        in_camera = surface @ room[b].viewmat[:3, :3].T + room[b].viewmat[:3, 3]
        pixels = (in_camera @ room[b].K.T)[:, :2] / in_camera[:, 2:]
        expected = pixels * torch.tensor([GRIDS[b][1] / room[b].width, GRIDS[b][0] / room[b].height])
        assert len(points) > 30
        # A fiftieth of a patch: the sphere is not linear between pixels.
        torch.testing.assert_close(points.target.double(), expected.double(), atol=0.02, rtol=0)


def test_sideways_step_along_a_wall_shifts_by_whole_patches():
    """A camera moved parallel to a wall by what two patches cover there shifts everything by exactly two patches."""
    depth, patch = 2.5, 14
    step = 2 * patch * depth / 150.0
    left = make_view((0.0, 0.0, 0.0), (0.0, 0.0, 1.0), ball=False)
    right = make_view((step, 0.0, 0.0), (step, 0.0, 1.0), ball=False)
    grid = (12, 16)
    points = correspondences(left, right, grid, grid)
    on_wall = patch_points(left, grid, ball=False).reshape(-1, 3)[points.patch_index][:, 2] > ROOM[2] - 1e-6
    source = torch.stack([points.patch_index % 16, points.patch_index // 16], -1) + 0.5
    shift = (points.target - source)[on_wall]
    assert len(shift) > 80
    torch.testing.assert_close(shift, torch.tensor([-2.0, 0.0]).expand_as(shift), atol=1e-4, rtol=0)
    maps = [embed(patch_points(view, grid, ball=False)) for view in (left, right)]
    wall_points = Correspondences(points.patch_index[on_wall], points.target[on_wall])
    # With so small a radius a grid off by half a patch would match nothing.
    assert match_rate(maps[0], maps[1], wall_points, radius=0.25) == (len(shift), len(shift))


def hidden_by_ball(points: torch.Tensor, eye: torch.Tensor, margin: float) -> torch.Tensor:
    """Whether the straight line from ``eye`` to each point passes the ball's centre within radius + margin."""
    centre, radius = BALL
    direction = torch.nn.functional.normalize(points - eye, dim=-1)
    along = ((centre - eye) * direction).sum(-1)
    near = (centre - eye - along[:, None] * direction).norm(dim=-1)
    return (near < radius + margin) & (along < (points - eye).norm(dim=-1))


def test_points_hidden_in_the_other_view_are_rejected(room):
    a, b = 0, 3
    surface = patch_points(room[a], GRIDS[a]).reshape(-1, 3)
    on_wall = (surface - BALL[0]).norm(dim=-1) > BALL[1] + 1e-6
    hidden = on_wall & hidden_by_ball(surface, torch.tensor(EYES[b], dtype=torch.float64), margin=0.0)
    kept = correspondences(room[a], room[b], GRIDS[a], GRIDS[b]).patch_index
    assert hidden.sum() >= 5
    assert not hidden[kept].any()
    without_ball = [make_view(EYES[k], TARGETS[k], ball=False) for k in (a, b)]
    seen_without_ball = correspondences(without_ball[0], without_ball[1], GRIDS[a], GRIDS[b]).patch_index
    assert hidden[seen_without_ball].sum() >= 5


def test_points_floating_before_the_other_views_surface_are_rejected(room):
    """The other way round: a's depth is too near (a floater), b sees the wall behind."""
    floating = SurfaceView(room[0].viewmat, room[0].K, 224, 168, 0.6 * room[0].depth)
    assert len(correspondences(room[0], room[1], GRIDS[0], GRIDS[1])) > 50
    assert len(correspondences(floating, room[1], GRIDS[0], GRIDS[1])) < 5


def test_empty_transparent_and_broken_depth_is_no_surface(room):
    grid = (12, 16)
    everywhere = len(correspondences(room[0], room[0], grid, grid))
    depth = room[0].depth.clone()
    depth[:, :56], depth[:, 56:112], depth[:, 112:168] = 0, float("nan"), float("inf")
    broken = SurfaceView(room[0].viewmat, room[0].K, 224, 168, depth)
    kept = correspondences(broken, broken, grid, grid).patch_index
    assert 0 < len(kept) <= everywhere / 3
    assert (kept % 16 >= 12).all()
    accumulation = torch.ones(168, 224)
    accumulation[:84] = 0.2
    glassy = SurfaceView(room[0].viewmat, room[0].K, 224, 168, room[0].depth, accumulation)
    for first, second in ((glassy, room[0]), (room[0], glassy)):
        assert (correspondences(first, second, grid, grid).patch_index // 16 >= 6).all()


def test_edges_of_depth_are_not_interpolated():
    """A point between near and far surface belongs to neither."""
    view = make_view((0.0, 0.0, 0.0), (0.0, 0.0, 1.0), ball=False)
    depth = torch.full((168, 224), 2.0)
    depth[:, 105:] = 1.0  # the centre of patch column 7 is at x = 105, right on the edge
    edged = SurfaceView(view.viewmat, view.K, 224, 168, depth)
    columns = correspondences(edged, edged, (12, 16), (12, 16)).patch_index % 16
    assert set(columns.tolist()) == set(range(16)) - {7}


def test_views_behind_each_other_share_nothing():
    front = make_view((0.0, 0.0, 0.0), (0.0, 0.0, 1.0), ball=False)
    back = make_view((0.0, 0.0, 0.0), (0.0, 0.0, -1.0), ball=False)
    assert len(correspondences(front, back, (12, 16), (12, 16))) == 0


def test_depth_noise_is_tolerated_and_depth_size_is_free(room):
    generator = torch.Generator().manual_seed(1)
    clean = len(correspondences(room[0], room[1], GRIDS[0], GRIDS[1]))
    noisy = []
    for view in room[:2]:
        noise = 1 + 0.004 * torch.randn(view.depth.shape, generator=generator)
        noisy.append(SurfaceView(view.viewmat, view.K, view.width, view.height, view.depth * noise))
    assert len(correspondences(noisy[0], noisy[1], GRIDS[0], GRIDS[1])) > 0.9 * clean
    small = []
    for view in room[:2]:
        centres = pixel_centres(84, 112, 2, 2)
        small.append(
            SurfaceView(view.viewmat, view.K, 224, 168, cast(view.viewmat, view.K, centres, ball=True)[0].float())
        )
    points = correspondences(small[0], small[1], GRIDS[0], GRIDS[1])
    assert len(points) > 0.85 * clean
    surface = patch_points(room[0], GRIDS[0]).reshape(-1, 3)[points.patch_index]
    in_camera = surface @ room[1].viewmat[:3, :3].T + room[1].viewmat[:3, 3]
    expected = (in_camera @ room[1].K.T)[:, :2] / in_camera[:, 2:] / 14
    torch.testing.assert_close(points.target.double(), expected, atol=0.05, rtol=0)


def test_coarse_depth_of_a_slanted_wall_is_exact():
    """Inverse depth is linear in the image of a plane; depth itself is not."""
    K = torch.tensor([[150.0, 0, 112], [0, 150.0, 84], [0, 0, 1]], dtype=torch.float64)
    views = []
    for eye, target in (((-1.0, 0.0, 0.0), (1.5, 0.1, 2.5)), ((-0.6, 0.2, 0.3), (1.0, 0.0, 2.5))):
        viewmat = look_at(eye, target)
        depth, points = cast(viewmat, K, pixel_centres(12, 16, 14, 14), ball=False)
        on_wall = points[..., 2] > ROOM[2] - 1e-6
        views.append(SurfaceView(viewmat, K, 224, 168, torch.where(on_wall, depth, 0.0)))
    points = correspondences(views[0], views[1], (24, 32), (24, 32), relative_depth_tolerance=0.3)
    surface = patch_points(views[0], (24, 32), ball=False).reshape(-1, 3)[points.patch_index]
    in_camera = surface @ views[1].viewmat[:3, :3].T + views[1].viewmat[:3, 3]
    expected = (in_camera @ K.T)[:, :2] / in_camera[:, 2:] / 7
    assert len(points) > 100
    torch.testing.assert_close(points.target.double(), expected, atol=1e-5, rtol=0)


def test_depth_must_agree_even_where_the_image_place_does():
    """On the axis of a camera that moved straight ahead, a wrong depth still projects to the right place."""
    behind, ahead = (make_view((0.0, 0.0, z), (0.0, 0.0, 2.0), ball=False) for z in (-1.0, 0.0))
    floating = SurfaceView(behind.viewmat, behind.K, 224, 168, 0.8 * behind.depth)
    centre = (1, 1)  # one patch: its centre is the axis
    assert len(correspondences(behind, ahead, centre, centre)) == 1
    assert len(correspondences(floating, ahead, centre, centre)) == 0


def test_image_place_must_agree_even_where_the_depth_nearly_does():
    """Between far apart cameras, a depth within the tolerance can still be another point of the surface."""
    left = make_view((-1.5, 0.0, 0.0), (0.0, 0.0, 2.0), ball=False)
    right = make_view((1.5, 0.0, 0.0), (0.0, 0.0, 2.0), ball=False)
    wrong = SurfaceView(right.viewmat, right.K, 224, 168, 1.15 * right.depth)
    grid = (24, 32)
    assert len(correspondences(left, right, grid, grid, relative_depth_tolerance=0.2)) > 100
    assert len(correspondences(left, wrong, grid, grid, relative_depth_tolerance=0.2)) == 0


def test_malformed_views_are_refused(room):
    with pytest.raises(ValueError, match="viewmat"):
        SurfaceView(torch.eye(3), room[0].K, 224, 168, room[0].depth)
    with pytest.raises(ValueError, match="accumulation"):
        SurfaceView(room[0].viewmat, room[0].K, 224, 168, room[0].depth, torch.ones(3, 3))


# -- matched views ------------------------------------------------------------------------------------------------


def rate(matched, maps) -> float:
    share = matched.match(maps)
    assert share is not None
    return share


def test_features_of_the_surface_match(room):
    pairs = choose_pairs(room, GRIDS)
    matched = MatchedViews(room, GRIDS)
    assert rate(matched, surface_maps(room)) > 0.96
    assert matched.num_pairs == len(pairs) >= 5
    both_ways = [*pairs, *((b, a) for a, b in pairs)]
    assert matched.num_points == sum(len(correspondences(room[a], room[b], GRIDS[a], GRIDS[b])) for a, b in both_ways)


def test_features_of_the_image_position_do_not(room):
    """Identical in every view at the same place of the picture: what a useless positional encoding looks like."""
    maps = [embed(3 * pixel_centres(grid[0], grid[1], 1 / grid[0], 1 / grid[1])) for grid in GRIDS]
    assert rate(MatchedViews(room, GRIDS), maps) < 0.15


def test_shuffled_features_are_at_chance(room):
    generator = torch.Generator().manual_seed(2)
    maps = []
    for feature_map in surface_maps(room):
        order = torch.randperm(feature_map[0].numel(), generator=generator)
        maps.append(feature_map.flatten(1)[:, order].reshape(feature_map.shape))
    chance = 7 / (12 * 16)
    assert 0 < rate(MatchedViews(room, GRIDS), maps) < 2.5 * chance


def test_constant_zero_and_broken_features_give_a_low_finite_rate(room):
    for value in (0.0, 1.0, float("nan")):
        maps = [torch.full((8, *grid), value) for grid in GRIDS]
        assert rate(MatchedViews(room, GRIDS), maps) < 0.15


def test_identity_pair_matches_completely(room):
    maps = surface_maps(room)
    matched = MatchedViews([room[0], room[0]], [GRIDS[0], GRIDS[0]], pairs=[(0, 1)])
    assert matched.match([maps[0], maps[0]]) == 1.0
    assert matched.num_pairs == 1


def test_rate_does_not_depend_on_scale_or_dtype_of_the_features(room):
    maps = surface_maps(room)
    matched = MatchedViews(room, GRIDS)
    expected = matched.match(maps)
    scaled = [(k + 0.5) * feature_map.double() for k, feature_map in enumerate(maps)]
    assert matched.match(scaled) == expected
    assert matched.match([m.half() for m in maps]) == pytest.approx(expected, abs=0.02)


def test_no_pair_gives_no_number(room):
    for views in (room[:1], []):
        matched = MatchedViews(views, GRIDS[: len(views)])
        assert matched.match(surface_maps(room)[: len(views)]) is None
        assert (matched.num_points, matched.num_pairs) == (0, 0)


def test_mismatched_inputs_are_refused(room):
    for maps in (surface_maps(room)[:2], [*surface_maps(room)[:-1], torch.ones(8, 3, 3)]):
        with pytest.raises(ValueError, match="maps"):
            MatchedViews(room, GRIDS).match(maps)
    with pytest.raises(ValueError, match="grids"):
        MatchedViews(room, GRIDS[:2])
    with pytest.raises(ValueError, match="grids"):
        choose_pairs(room, GRIDS[:2])


# -- choice of pairs ----------------------------------------------------------------------------------------------


def test_pairs_share_surface_but_are_not_the_same_picture(room):
    same, opposite = room[0], make_view(EYES[0], (-1.6, -0.3, -3.0))
    views, grids = [*room, same, opposite], [*GRIDS, (12, 16), (12, 16)]
    pairs = choose_pairs(views, grids)
    assert pairs == sorted(pairs) and all(a < b for a, b in pairs)
    assert (0, 5) not in pairs, "no displacement: any feature of the image position would match"
    assert not any(6 in pair for pair in pairs), "looks away: nothing shared"
    for a, b in pairs:
        assert len(correspondences(views[a], views[b], grids[a], grids[b])) > 0.15 * math.prod(grids[a])


def test_choice_is_deterministic_and_bounded(room):
    pairs = choose_pairs(room, GRIDS)
    assert choose_pairs(room, GRIDS) == pairs
    few = choose_pairs(room, GRIDS, max_pairs=3)
    assert len(few) == 3 and set(few) <= set(pairs)
    assert choose_pairs(room, GRIDS, min_overlap=1.0) == []


@pytest.mark.gpu
def test_gpu_gives_the_rate_of_the_cpu(room):
    maps = surface_maps(room)
    on_gpu = [SurfaceView(v.viewmat.cuda(), v.K.cuda(), v.width, v.height, v.depth.cuda()) for v in room]
    expected, result = MatchedViews(room, GRIDS), MatchedViews(on_gpu, GRIDS)
    assert (result.num_points, result.num_pairs) == (expected.num_points, expected.num_pairs)
    assert rate(result, [m.cuda() for m in maps]) == pytest.approx(rate(expected, maps), abs=0.005)
