"""Outputs for looking at features: what they show, and that nothing can end a browser's render thread."""

import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from fake_browser import FakeBrowser, running_viewer
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.utils.eval_utils import eval_setup

from fit3d_ns.lifting.lift import project, teacher_basis
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.solver import LiftSolver
from fit3d_ns.scenes import teacher_views
from fit3d_ns.scenes.views import resident_scene
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer import outputs
from fit3d_ns.viewer.drawing import lettering
from fit3d_ns.viewer.outputs import PICTURES
from fit3d_ns.viewer.query import look_at_pixel

NAMES = list(PICTURES)


def training_camera(pipeline, index=0):
    return deepcopy(pipeline.datamanager.train_dataset.cameras[index : index + 1]).to(pipeline.device)


def click(pipeline, index=0):
    """Queries the middle of a training view."""
    point = look_at_pixel(pipeline.feature_view, training_camera(pipeline, index), (0.5, 0.5))
    pipeline.feature_view.query = point.feature
    return point


def assert_picture(picture, rgb):
    assert picture.shape == rgb.shape and picture.shape[-1] == 3
    assert torch.isfinite(picture).all()
    assert picture.min() >= 0 and picture.max() <= 1


def assert_sentence(picture, name, words, view):
    """Asserts that a picture is the sentence that holds these words."""
    with pytest.raises(UserError, match=words) as raised:
        PICTURES[name](view)
    assert torch.equal(picture, lettering(f"{name}: {raised.value}", picture))


def test_every_output_is_a_picture_and_none_is_drawn_unasked(viewed_run, monkeypatch):
    pipeline = viewed_run.pipeline
    click(pipeline)
    drawn = []
    monkeypatch.setattr(
        outputs,
        "PICTURES",
        {name: lambda frame, name=name: drawn.append(name) or PICTURES[name](frame) for name in NAMES},
    )
    result = pipeline.model.get_outputs_for_camera(training_camera(pipeline))
    assert set(NAMES) | {"rgb", "depth", "accumulation", "background"} == set(result)
    assert result["rgb"].shape == (72, 96, 3) and drawn == []
    pictures = {}
    for name in NAMES:
        pictures[name] = result[name]
        assert_picture(result[name], result["rgb"])
    assert drawn == NAMES  # once each, however often it is read
    for name in NAMES:
        assert all(not torch.equal(pictures[name], pictures[other]) for other in NAMES if other != name)


def test_evaluation_draws_no_picture(viewed_run, monkeypatch):
    def refuse(frame):
        raise AssertionError("drawn")

    monkeypatch.setattr(outputs, "PICTURES", {name: refuse for name in NAMES})
    metrics = viewed_run.pipeline.get_average_eval_image_metrics()
    assert "feature_cosine" in metrics


def test_feature_pca_is_the_decoded_map_in_the_scenes_basis(viewed_run):
    pipeline, model = viewed_run.pipeline, viewed_run.pipeline.model
    camera = training_camera(pipeline)
    view = pipeline.feature_view
    result = model.get_outputs_for_camera(camera)
    picture = result["feature_pca"]
    low, alpha = model.render_low(camera, render_size=result.feature_size())
    decoded = model.fit3d_decoder(low / alpha.clamp_min(1e-3))  # [C, h, w], as distillation would see it
    basis = view.colors().basis
    projected = basis.basis.project(decoded.permute(1, 2, 0)).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(projected[None], size=(72, 96), mode="bilinear", align_corners=False)[0]
    colors = ((resized.permute(1, 2, 0) - basis.low) / (basis.high - basis.low)).clamp(0, 1)
    solid = result["accumulation"][..., 0] > 0.999
    inner = torch.zeros_like(solid)
    inner[4:-4, 4:-4] = True  # the border's window is padded by repetition instead of zeros
    assert (solid & inner).sum() > 200
    assert (picture - colors).abs()[solid & inner].max() < 0.02
    # The same Gaussians without the window: the same colours where the scene is even.
    assert (result["feature_pca_low"] - picture).abs()[solid & inner].mean() < 0.15


def test_the_basis_is_fixed_until_refreshed(viewed_run):
    pipeline, model = viewed_run.pipeline, viewed_run.pipeline.model
    first = model.get_outputs_for_camera(training_camera(pipeline, 0))["feature_pca"]
    basis = pipeline.feature_view.colors().basis
    model.get_outputs_for_camera(training_camera(pipeline, 5))["teacher_pca"]
    assert pipeline.feature_view.colors().basis is basis
    assert torch.equal(model.get_outputs_for_camera(training_camera(pipeline, 0))["feature_pca"], first)
    features = model.gauss_params["fit3d_features"]
    features.data = features.data.flip(1)
    assert not torch.equal(model.get_outputs_for_camera(training_camera(pipeline, 0))["feature_pca"], first)
    assert pipeline.feature_view.colors().basis is basis
    pipeline.feature_view.refresh()
    assert not torch.equal(pipeline.feature_view.colors().basis.basis.components, basis.basis.components)


def test_similarity_is_the_cosine_of_decoded_features(viewed_run):
    pipeline, model = viewed_run.pipeline, viewed_run.pipeline.model
    point = click(pipeline)
    view = pipeline.feature_view
    camera = training_camera(pipeline)
    result = model.get_outputs_for_camera(camera)
    low, _ = model.render_low(camera, render_size=(72, 96))
    decoded = torch.einsum("cd,dhw->chw", model.fit3d_decoder.weight.sum((2, 3)), low)
    cosines = torch.nn.functional.cosine_similarity(decoded, point.feature[:, None, None], dim=0)
    assert cosines[34:38, 46:50].min() > 0.98  # where the click was
    view.threshold = float(cosines.median())
    shown = (result["similarity"] - result["similarity"].mean(-1, keepdim=True)).abs().sum(-1) > 1e-3
    solid = (cosines - view.threshold).abs() > 0.1 * cosines.std()
    assert (shown == (cosines >= view.threshold))[solid].float().mean() > 0.9
    # Beyond the largest cosine, nothing is left but the photo in shades of grey.
    view.threshold = 1.01
    grey = model.get_outputs_for_camera(camera)["similarity"]
    assert torch.equal(grey[..., 0], grey[..., 1]) and torch.equal(grey[..., 1], grey[..., 2])


def test_a_click_finds_the_surface(viewed_run):
    pipeline = viewed_run.pipeline
    point = click(pipeline)
    camera = training_camera(pipeline)
    depth = pipeline.model.get_outputs_for_camera(camera)["depth"][36, 48, 0]
    pose = camera.camera_to_worlds[0]
    assert torch.allclose(point.position, pose[:, 3] - depth * pose[:, 2], atol=1e-4)
    assert point.feature.shape == (64,)
    corner = look_at_pixel(pipeline.feature_view, camera, (0.1, 0.8)).position
    viewmat, intrinsics = pipeline.model.view_matrices(camera)
    pixel = intrinsics @ (viewmat[:3, :3] @ corner + viewmat[:3, 3])
    assert torch.allclose(pixel[:2] / pixel[2], torch.tensor([9.6, 57.6]), atol=1e-3)
    away = OrientedBox.from_params((50.0, 50.0, 50.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(UserError, match="nothing where you clicked"):
        look_at_pixel(pipeline.feature_view, camera, (0.5, 0.5), away)


def test_teacher_pca_shows_the_photos_own_map(viewed_run):
    pipeline, model = viewed_run.pipeline, viewed_run.pipeline.model
    camera = training_camera(pipeline, 3)
    picture = model.get_outputs_for_camera(camera)["teacher_pca"]
    teacher = pipeline.datamanager.teacher_map("train", 3).float()
    colors = pipeline.feature_view.colors().basis.to_rgb(teacher.permute(1, 2, 0)).permute(2, 0, 1)
    expected = torch.nn.functional.interpolate(colors[None], size=(72, 96), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(picture, expected.permute(1, 2, 0), atol=1e-3)


def test_teacher_pca_follows_a_turned_camera_and_says_where_it_is_to_be_had(viewed_run):
    pipeline, model = viewed_run.pipeline, viewed_run.pipeline.model
    camera = training_camera(pipeline, 3)
    straight = model.get_outputs_for_camera(camera)["teacher_pca"]
    angle = 2 * torch.atan(44.5 / camera.fx[0, 0])  # the column 3 pixels from one border comes to the other one
    turned = training_camera(pipeline, 3)
    turn = torch.tensor([[angle.cos(), 0, angle.sin()], [0, 1, 0], [-angle.sin(), 0, angle.cos()]])
    turned.camera_to_worlds[0, :, :3] = camera.camera_to_worlds[0, :, :3] @ turn.to(camera.camera_to_worlds)
    picture = model.get_outputs_for_camera(turned)["teacher_pca"]
    assert (picture[:, 92] - straight[:, 3]).abs().mean() < 1e-3  # it looks to the left now
    assert picture[:, :86].max() <= 0.25  # outside the photo: what the splat shows, dark
    elsewhere = training_camera(pipeline, 3)
    elsewhere.camera_to_worlds[0, :, 3] += 0.2
    result = model.get_outputs_for_camera(elsewhere)
    assert_sentence(result["teacher_pca"], "teacher_pca", "training views only", result)


def test_view_variance_is_that_of_the_lifting_solver(viewed_run):
    pipeline, model = viewed_run.pipeline, viewed_run.pipeline.model
    picture = model.get_outputs_for_camera(training_camera(pipeline))["view_variance"]
    views = resident_scene(pipeline.datamanager, model).training
    basis = teacher_basis(views, 64, 8, torch.device("cpu"))
    with torch.no_grad():
        aggregate = LiftSolver(
            FeatureOperator(model.geometry, model.feature_grid), project(views, basis), 8
        ).aggregate()
    values = pipeline.feature_view.disagreement().values
    assert torch.allclose(values.square(), aggregate.variance * aggregate.seen, rtol=1e-4, atol=1e-4)
    pipeline.feature_view.take_disagreement(aggregate.variance, aggregate.coverage)
    again = model.get_outputs_for_camera(training_camera(pipeline))["view_variance"]
    assert torch.allclose(again, picture, atol=1e-2)
    pipeline.feature_view.take_disagreement(aggregate.variance[:-1], aggregate.coverage[:-1])  # of other Gaussians
    assert len(pipeline.feature_view.disagreement().values) == model.num_points


def test_no_teacher_is_run_for_looking(viewed_run, monkeypatch):
    """A run that is opened finds its maps in the cache; without the cache it says so."""
    monkeypatch.setattr("fit3d_ns.datamanager.load_backbone", lambda *_: pytest.fail("the teacher was loaded"))
    monkeypatch.setattr("fit3d_ns.data.feature_cache.backbone_identity", lambda *_: pytest.fail("weights were read"))
    _, pipeline, _, _ = eval_setup(viewed_run.base_dir / "config.yml")
    camera = training_camera(pipeline, 2)
    result = pipeline.model.get_outputs_for_camera(camera)
    expected = viewed_run.pipeline.model.get_outputs_for_camera(camera)
    for name in ("teacher_pca", "view_variance"):
        assert torch.allclose(result[name], expected[name], atol=1e-2), name
    assert "cached_train" not in pipeline.datamanager.__dict__  # no photo but the ones looked at was kept
    shutil.rmtree(pipeline.datamanager.get_datapath() / ".fit3d_cache")
    _, pipeline, _, _ = eval_setup(viewed_run.base_dir / "config.yml")
    result = pipeline.model.get_outputs_for_camera(camera)
    assert_sentence(result["teacher_pca"], "teacher_pca", "not in .*fit3d_cache", result)
    assert_sentence(result["view_variance"], "view_variance", "not in .*fit3d_cache", result)


def test_nothing_ends_a_render_thread(untrained, tmp_path):
    """Step 0 with zero features, an empty crop, broken features, a picture that fails, split screens, two browsers."""
    pose = training_camera(untrained).camera_to_worlds[0]
    model = untrained.model
    with running_viewer(untrained, tmp_path) as viewer:
        panel = viewer.control_panel
        browsers = [
            FakeBrowser(viewer, pose),
            FakeBrowser(viewer, training_camera(untrained, 4).camera_to_worlds[0], 0.2),
        ]
        try:
            for step in ("zero", "trained", "segment", "empty crop", "broken", "failing"):
                if step == "trained":
                    model.gauss_params["fit3d_features"].data.normal_()
                elif step == "segment":
                    untrained.feature_view.query = torch.ones(64)
                    untrained.feature_view.segment, untrained.feature_view.threshold = True, 1.1
                elif step == "empty crop":
                    panel._crop_viewport.value, panel._crop_center.value = True, (50.0, 50.0, 50.0)
                elif step == "broken":
                    panel._crop_viewport.value, untrained.feature_view.segment = False, False
                    model.gauss_params["fit3d_features"].data.fill_(float("nan"))
                    untrained.feature_view.refresh()
                elif step == "failing":
                    model.fit3d_decoder.weight.data = torch.zeros(3, 3)  # no decoder at all
                panel._split.value = step == "trained"
                for output in [*NAMES, "rgb", "background"]:
                    panel._split_output_render.value = NAMES[-1 - NAMES.index(output)] if output in NAMES else "rgb"
                    pictures = [browser.look(output) for browser in browsers]
                    assert all(picture.dtype == np.uint8 and picture.ndim == 3 for picture in pictures), (step, output)
            assert all(browser.alive for browser in browsers)
        finally:
            for browser in browsers:
                browser.close()


def test_a_browser_computes_what_it_shows(viewed_run, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        outputs,
        "PICTURES",
        {name: lambda frame, name=name: drawn.append(name) or PICTURES[name](frame) for name in NAMES},
    )
    pose = training_camera(viewed_run.pipeline).camera_to_worlds[0]
    with running_viewer(viewed_run.pipeline, viewed_run.base_dir) as viewer:
        browser = FakeBrowser(viewer, pose)
        plain = browser.look("rgb")
        assert drawn == []
        assert browser.look("feature_pca").std() > 5 and set(drawn) == {"feature_pca"}
        assert not np.array_equal(browser.look("feature_pca"), plain)
        panel = viewer.control_panel
        panel._split.value, panel._split_output_render.value = True, "clusters"
        drawn.clear()
        split = browser.look("rgb")
        assert set(drawn) == {"clusters"}
        half = split.shape[1] // 2 - 2
        assert np.abs(split[:, :half].astype(int) - plain[:, :half]).max() <= 1
        assert np.abs(split[:, half + 4 :].astype(int) - plain[:, half + 4 :]).mean() > 10
        browser.close()


def test_a_segment_is_shown_alone_in_browsers_only(viewed_run):
    pipeline, model = viewed_run.pipeline, viewed_run.pipeline.model
    click(pipeline)
    view = pipeline.feature_view
    chosen = view.similar()
    space = view.space()
    cosines = torch.nn.functional.cosine_similarity(
        space.decode(space.coordinates(view.features)), view.query[None], dim=1
    )
    assert torch.equal(chosen, cosines >= view.threshold)
    camera = training_camera(pipeline)
    whole = model.get_outputs_for_camera(camera)["accumulation"]
    with running_viewer(pipeline, viewed_run.base_dir) as viewer:
        browser = FakeBrowser(viewer, camera.camera_to_worlds[0])
        everything = browser.look("accumulation")
        view.segment, view.threshold = True, float(cosines.quantile(0.7))
        alone = browser.look("accumulation")
        assert not np.array_equal(alone, everything)
        # An evaluation while the viewer shows a segment measures the whole scene.
        assert torch.equal(model.get_outputs_for_camera(camera)["accumulation"], whole)
        browser.close()


def test_a_plain_splatfacto_run_is_viewed_as_ever(scene, make_config, make_trainer, tmp_path, monkeypatch):
    from plain_splatfacto import PlainSplatfacto

    config = make_config(scene, method="splatfacto", steps=2)
    config.pipeline.model._target = PlainSplatfacto
    pipeline = make_trainer(config).pipeline
    pipeline.eval()
    with running_viewer(pipeline, tmp_path) as viewer:
        browser = FakeBrowser(viewer, training_camera(pipeline).camera_to_worlds[0])
        assert browser.look("rgb").shape[-1] == 3
        assert not set(NAMES) & set(viewer.control_panel._output_render.options)
        browser.close()


def test_standing_at_a_view_has_a_tolerance(viewed_run):
    views = viewed_run.pipeline.feature_view.teacher
    camera = training_camera(viewed_run.pipeline, 1)
    camera.camera_to_worlds[0, 0, 3] += teacher_views.NEAR * 0.9
    assert views.standing_at(camera) == 1
    camera.camera_to_worlds[0, 0, 3] += teacher_views.NEAR * 0.3
    assert views.standing_at(camera) is None
