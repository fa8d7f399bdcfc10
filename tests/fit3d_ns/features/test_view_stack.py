"""Many pairs of views at once, against pairs taken one by one."""

import itertools
from dataclasses import replace

import torch
from test_metrics import EYES, TARGETS, make_view

from fit3d_ns.features.correspondences import SurfaceView, ViewStack, correspondences
from fit3d_ns.features.metrics import choose_pairs

SIZES = [(168, 224), (126, 224), (168, 224), (140, 196)]
GRIDS = [(12, 16), (9, 16), (12, 16), (10, 14)]


def make_views():
    """Views of four directions and three sizes, one of them with a transparent half."""
    eyes = [(-1.0, 0.0, -1.5), (-0.4, -0.2, -1.4), (0.6, 0.1, -1.2), (1.2, 0.0, -0.8)]
    views = [make_view(eye, (0.3, 0.3, 1.0), height=height, width=width) for eye, (height, width) in zip(eyes, SIZES)]
    half = torch.ones_like(views[2].depth)
    half[:, :100] = 0.2
    views[2] = SurfaceView(views[2].viewmat, views[2].K, views[2].width, views[2].height, views[2].depth, half)
    return views


def test_a_stack_follows_points_as_a_pair_does():
    views = make_views()
    firsts, seconds = torch.tensor([0, 0, 2, 3, 2]), torch.tensor([1, 3, 0, 2, 2])
    valid, target = ViewStack(views).follow(firsts, seconds, (12, 16), GRIDS)
    for number, (a, b) in enumerate(zip(firsts.tolist(), seconds.tolist())):
        alone = correspondences(views[a], views[b], (12, 16), GRIDS[b])
        assert torch.equal(valid[number].nonzero()[:, 0], alone.patch_index)
        assert torch.equal(target[number, valid[number]].float(), alone.target)
        assert len(alone) > 5


def test_pairs_are_chosen_by_what_each_of_both_views_sees_of_the_other(monkeypatch):
    """The rule, written out for one pair at a time; also where pairs do not fit into one step."""
    views = make_views()
    coarse = [(round(h / 3), round(w / 3)) for h, w in GRIDS]
    share, shift = {}, {}
    for a, b in itertools.product(range(4), repeat=2):
        points = correspondences(views[a], views[b], coarse[a], coarse[b])
        size_a, size_b = (torch.tensor([w, h]) for h, w in (coarse[a], coarse[b]))
        place = torch.stack([points.patch_index % coarse[a][1], points.patch_index // coarse[a][1]], -1) + 0.5
        moved = (points.target / size_b - place / size_a) * torch.tensor([GRIDS[b][1], GRIDS[b][0]])
        share[a, b] = len(points) / len(correspondences(views[a], views[a], coarse[a], coarse[a]))
        shift[a, b] = float(moved.norm(dim=1).median())
    counts = []
    for overlap, displacement in ((0.1, 0.0), (0.3, 1.0), (0.3, 3.0)):
        expected = [
            (a, b)
            for a, b in itertools.combinations(range(4), 2)
            if min(share[a, b], share[b, a]) >= overlap and min(shift[a, b], shift[b, a]) >= displacement
        ]
        counts.append(len(expected))
        for points in (1 << 17, 50):
            monkeypatch.setattr("fit3d_ns.features.metrics._POINTS_PER_STEP", points)
            assert choose_pairs(views, GRIDS, min_overlap=overlap, min_displacement=displacement) == expected
    assert counts[0] > counts[1] > counts[2]


def test_a_thinned_surface_matches_the_same_points():
    grid = (9, 12)
    views = [make_view(EYES[index], TARGETS[index]) for index in (1, 2)]
    views = [replace(view, accumulation=torch.ones_like(view.depth)) for view in views]
    thin = [view.thinned(112) for view in views]
    for few, all_of_it in zip(thin, views):
        assert few.depth.shape == few.accumulation.shape == (84, 112) and few.K is all_of_it.K
        assert set(few.depth.flatten().tolist()) <= set(all_of_it.depth.flatten().tolist()), "no depth is invented"
        assert all_of_it.thinned(224) is all_of_it
    whole, few = correspondences(views[0], views[1], grid, grid), correspondences(thin[0], thin[1], grid, grid)
    targets = dict(zip(few.patch_index.tolist(), few.target))
    shared = [index for index in whole.patch_index.tolist() if index in targets]
    assert len(shared) >= 0.9 * max(len(whole), len(few)) and len(whole) > 20
    both = torch.stack([targets[index] for index in shared])
    kept = torch.tensor([index in targets for index in whole.patch_index.tolist()])
    assert (both - whole.target[kept]).norm(dim=-1).median() < 0.1  # in patches; a match may be off by 1.5
