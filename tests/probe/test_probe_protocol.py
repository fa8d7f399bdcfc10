"""The protocols' geometry and colours against values worked out by hand or by other libraries."""

import colorsys

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from fit3d_ns.backbones import BackboneOutput
from probe.augment import (
    augment_depth,
    augment_normals,
    augment_segmentation,
    change_colors,
    depth_window,
    distort,
    draw_color_change,
    draw_distortion,
    resize_image,
    resize_nearest,
    scaled_size,
)
from probe.data.base import LabelRule, ProbeData
from probe.data.batches import sample_index, sample_rng
from probe.protocols import DepthRecipe, SegmentationRecipe, choose_recipe
from probe.tasks.normals import normals_from_depth
from probe.tasks.segmentation import SegmentationTask, sliding_windows


def _segmentation_recipe() -> SegmentationRecipe:
    recipe = choose_recipe("segmentation", "folder")
    assert isinstance(recipe, SegmentationRecipe)
    return recipe


def _depth_recipe(dataset) -> DepthRecipe:
    recipe = choose_recipe("depth", dataset)
    assert isinstance(recipe, DepthRecipe)
    return recipe


def test_windows_cover_every_pixel_and_the_last_is_moved_inside():
    windows = sliding_windows((512, 700), 512, 341)
    assert [(w[0].start, w[1].start, w[1].stop) for w in windows] == [(0, 0, 512), (0, 188, 700)]
    assert sliding_windows((300, 400), 512, 341) == [(slice(0, 300), slice(0, 400))]
    covered = np.zeros((1100, 700), int)
    for rows, columns in sliding_windows((1100, 700), 512, 341):
        covered[rows, columns] += 1
        assert (rows.stop - rows.start, columns.stop - columns.start) == (512, 512)
    assert covered.min() == 1 and covered.max() >= 2


class _Linear(torch.nn.Module):
    """A head that knows nothing of its surroundings: logits are the features."""

    def forward(self, features: BackboneOutput) -> torch.Tensor:
        return features.patch_tokens


def test_sliding_window_equals_the_whole_photo_where_it_must():
    data = ProbeData("x", "segmentation", (), (), classes=("a", "b", "c"), labels=LabelRule(3))
    task = SegmentationTask(data, _segmentation_recipe())
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    views = task.test_views(image)
    assert views.shape == (1, 512, 512, 3) and np.array_equal(views[0], image)
    features = BackboneOutput(torch.randn(1, 3, 37, 37), None)
    assert torch.equal(
        task.predict(_Linear(), features, (512, 512)), task.predict_whole(_Linear(), features, (512, 512))
    )
    # Windows that agree where they overlap give what each of them says.
    wide = task.test_views(rng.integers(0, 256, (512, 853, 3), dtype=np.uint8))
    assert wide.shape == (2, 512, 512, 3)
    constant = torch.zeros(2, 3, 37, 37)
    constant[:, 1] = 1
    assert (task.predict(_Linear(), BackboneOutput(constant, None), (512, 853)) == 1).all()


def test_sizes_as_mmcv_rounds_them():
    assert scaled_size(480, 640, 2048, 512) == (512, 683)
    assert scaled_size(300, 3000, 2048, 512) == (205, 2048)
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(resize_nearest(labels, (6, 8))[::2, ::2], labels)
    image = np.full((7, 9, 3), 131, np.uint8)
    assert (resize_image(image, (14, 5)) == 131).all()


@pytest.mark.parametrize("size", [(97, 61), (240, 500), (33, 40)])
def test_torchvision_resizes_as_the_references_do(size):
    """mmcv's: bilinear without antialiasing for photos, the nearest lower index for labels."""
    rng = np.random.default_rng(0)
    image, labels = rng.integers(0, 256, (120, 90, 3), np.uint8), rng.integers(0, 150, (120, 90), np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    wanted = torch.nn.functional.interpolate(planes, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    error = np.abs(resize_image(image, size) - wanted.numpy())
    assert error.max() < 1.01 and error.mean() < 0.35, "8 bits, rounded once for each direction"
    resized = transforms.resize(tv_tensors.Mask(labels), list(size)).numpy()
    assert (resized == resize_nearest(labels, size)).all()
    rows, columns = np.arange(size[0]) * 120 // size[0], np.arange(size[1]) * 90 // size[1]
    assert (resized == labels[rows][:, columns]).all()


def test_segmentation_crops_keep_photo_and_labels_together():
    recipe = _segmentation_recipe()
    labels = np.zeros((300, 400), np.uint8)
    labels[:, 200:] = 1
    labels[100:150] = 2
    image = np.stack([labels * 100, labels * 50, labels * 25], -1).astype(np.uint8)
    for number in range(12):
        crop, target, (height, width) = augment_segmentation(image, labels, recipe, sample_rng(0, number))
        assert crop.shape == (512, 512, 3) and target.shape == (512, 512)
        assert (target[height:] == 255).all() and (target[:, width:] == 255).all()
        inside = target[:height, :width]
        assert inside.max() <= 2
        # Away from borders between classes, interpolation changes nothing.
        assert (crop[:height, :width, 0] == inside * 100).mean() > 0.9
        shares = np.bincount(inside.ravel(), minlength=3) / inside.size
        assert shares.max() < 0.98


def test_depth_crops_keep_photo_and_depth_together():
    recipe = _depth_recipe("nyuv2")
    depth = np.linspace(1, 9, 480 * 640, dtype=np.float32).reshape(480, 640)
    image = np.repeat((depth * 25).astype(np.uint8)[..., None], 3, 2)
    rotated = 0
    for number in range(12):
        crop, target = augment_depth(image, depth, recipe, sample_rng(1, number))
        assert crop.shape == (416, 544, 3) and target.shape == (416, 544)
        known = target > 0
        rotated += int(not known.all())
        assert np.abs(crop[known][:, 0].astype(float) - target[known] * 25).mean() < 3
    assert 0 < rotated < 12
    kitti = _depth_recipe("kitti")
    wide, flat = np.zeros((375, 1242, 3), np.uint8), np.zeros((375, 1242), np.float32)
    flat[23, 13] = 1
    cut_image, cut = depth_window(wide, flat, kitti, training=False)
    assert cut_image.shape == (352, 1216, 3) and cut[0, 0] == 1
    assert augment_depth(wide, flat, kitti, sample_rng(0, 0))[1].shape == (352, 704)


def test_normals_of_a_tilted_plane_and_of_its_mirror_image():
    fx = fy = 50.0
    columns, rows = np.meshgrid(np.arange(60) + 0.5, np.arange(40) + 0.5)
    # The plane n . p = -3 with n towards the camera.
    normal = np.array([0.3, -0.2, -1.0]) / np.linalg.norm([0.3, -0.2, -1.0])
    rays = np.stack([(columns - 30) / fx, (rows - 20) / fy, np.ones_like(rows)], -1)
    depth = (-3 / (rays @ normal)).astype(np.float32)
    found = normals_from_depth(depth, (fx, fy, 30.0, 20.0))
    inside = found[1:-1, 1:-1]
    np.testing.assert_allclose(inside, np.broadcast_to(normal, inside.shape), atol=2e-3)
    assert not found[0].any()
    depth[10, 10] = 0
    assert not normals_from_depth(depth, (fx, fy, 30.0, 20.0))[9:12, 10].any()
    image = np.zeros((40, 60, 3), np.uint8)
    signs = {float(np.sign(augment_normals(image, found, sample_rng(0, n))[1][5, 5, 0])) for n in range(8)}
    assert signs == {1.0, -1.0}


def test_colors_against_colorsys():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (1, 3, 4, 5)).astype(np.float32))
    same = distort(images, torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]))
    torch.testing.assert_close(same, images, atol=1e-3, rtol=0)
    changed = distort(images, torch.tensor([[0.0, 1.0, 1.0, 1.4, 34.0]]))
    for y in range(4):
        for x in range(5):
            hue, saturation, value = colorsys.rgb_to_hsv(*(float(v) / 255 for v in images[0, :, y, x]))
            wanted = colorsys.hsv_to_rgb((hue + 34 / 360) % 1, min(1.0, saturation * 1.4), value)
            np.testing.assert_allclose(changed[0, :, y, x].numpy() / 255, wanted, atol=1e-4)
    brighter = distort(images, torch.tensor([[20.0, 0.5, 0.0, 1.0, 0.0]]))
    torch.testing.assert_close(brighter, (images + 20).clamp(0, 255) * 0.5, atol=1e-3, rtol=0)
    gamma = change_colors(images, torch.tensor([[1.1, 0.9, 1.0, 1.2]]))
    wanted = images[:, 2] ** 1.1 * 1.2
    torch.testing.assert_close(gamma[:, 2], wanted.clamp(0, 255), atol=1e-2, rtol=1e-5)


def test_drawn_colors_stay_in_their_ranges():
    drawn = np.stack([draw_distortion(sample_rng(0, n)) for n in range(400)])
    assert 0.4 < (drawn[:, 0] != 0).mean() < 0.6
    assert np.abs(drawn[:, 0]).max() <= 32 and drawn[:, 1].min() >= 0.5 and drawn[:, 3].max() <= 1.5
    assert drawn[:, 4].min() >= -36 and drawn[:, 4].max() <= 34
    recipe = _depth_recipe("kitti")
    gains = np.stack([draw_color_change(sample_rng(0, n), recipe.brightness) for n in range(400)])
    assert 0.4 < (gains[:, 0] == 1).mean() < 0.6
    assert gains[:, 1:].min() >= 0.9 * 0.9 and gains[:, 1:].max() <= 1.1 * 1.1


def test_order_is_a_function_of_seed_and_number():
    order = [sample_index(5, number, 7) for number in range(21)]
    assert all(sorted(order[k : k + 7]) == list(range(7)) for k in (0, 7, 14))
    assert order[:7] != order[7:14] and order != [sample_index(6, number, 7) for number in range(21)]
    assert sample_rng(0, 3).random() == sample_rng(0, 3).random() != sample_rng(0, 4).random()


@pytest.mark.parametrize("dataset,cap", [("nyuv2", "nyu_eigen"), ("scannet", "nyu_eigen"), ("scannetpp", "none")])
def test_recipes_name_their_data_set(dataset, cap):
    recipe = _depth_recipe(dataset)
    assert recipe.name == f"depth-linear-v1/{dataset}" and recipe.evaluation_crop == cap
    assert recipe.optimization.iterations * recipe.optimization.batch_size == 614_400
