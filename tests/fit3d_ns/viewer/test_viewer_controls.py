"""The viewer's controls: what they change, say and write; and runs whose data moved."""

import shutil
import socket
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_browser import FakeBrowser, running_viewer
from nerfstudio.scripts.render import DatasetRender
from nerfstudio.scripts.viewer import run_viewer
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.viewer.viewer_elements import ViewerClick, ViewerElement

from fit3d_ns.data.points.splat_ply import read_ply
from fit3d_ns.features.colors import SceneColors
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer.clusters import UNASSIGNED, assign_clusters, fit_clusters
from fit3d_ns.viewer.feature_space import FeatureSpace


def open_run(run) -> Any:
    """The pipeline of a run's folder, as ``ns-viewer`` opens it."""
    return eval_setup(run / "config.yml")[1]


def press(element):
    """Does what a click on a control does."""
    element.cb_hook(element)


def put(element, value):
    """Sets a control of a running viewer, and does what that does once; viser would do it again in its own thread."""
    callbacks = element.gui_handle._impl.update_cb
    kept = [*callbacks]
    callbacks.clear()
    element.value = value
    callbacks.extend(kept)
    press(element)


def clicked(controls, viewer, browser, place=(0.5, 0.5)):
    """Presses the button, then clicks at a place of a browser's picture; returns the status line."""
    viewer.viser_server.get_clients = lambda: {0: browser}
    viewer._trigger_rerender = lambda: None
    press(controls.c_click)
    assert controls.a_status.text == "Click on the scene."
    origin = tuple(float(value) / 10 for value in browser.camera.position)
    controls._query(ViewerClick(origin=origin, direction=(0.0, 0.0, 1.0), screen_pos=place))  # type: ignore[arg-type]
    return controls.a_status.text


def first_pose(pipeline):
    return pipeline.datamanager.train_dataset.cameras.camera_to_worlds[0]


def test_nerfstudio_finds_the_controls_and_checkpoints_do_not_carry_them(viewed_run):
    with running_viewer(viewed_run.pipeline, viewed_run.base_dir) as viewer:
        found = [path for path, _ in viewer.viewer_elements if path.startswith("Custom Elements/features/")]
        elements = [value for value in vars(viewed_run.pipeline.features).values() if isinstance(value, ViewerElement)]
        assert len(found) == len(elements) == 9
        assert viewed_run.pipeline.feature_view.viewer is viewer
    assert not [name for name in viewed_run.pipeline.state_dict() if name.startswith("features")]


def test_click_threshold_segment_export(viewed_run):
    pipeline = viewed_run.pipeline
    controls, view = pipeline.features, pipeline.feature_view
    with running_viewer(pipeline, viewed_run.base_dir) as viewer:
        browser = FakeBrowser(viewer, first_pose(pipeline))
        for element in (controls.g_export, controls.e_segment):
            put(element, True)
            assert "Nothing was clicked yet" in controls.a_status.text
        said = clicked(controls, viewer, browser)
        assert said.startswith(f"{int(view.similar().sum()):,} Gaussians are similar")
        put(controls.d_threshold, 0.9)
        assert view.threshold == 0.9
        put(controls.e_segment, True)
        assert controls.a_status.text == f"{int(view.similar().sum()):,} similar Gaussians are shown alone."
        press(controls.g_export)
        path = viewed_run.base_dir / "segment.ply"
        chosen = view.similar()
        assert 0 < chosen.sum() < len(chosen)
        assert controls.a_status.text == f"{int(chosen.sum()):,} Gaussians are in {path}."
        before = path.read_bytes()
        press(controls.g_export)
        assert controls.a_status.text == f"{path} exists: choose another name."
        assert path.read_bytes() == before
        controls.f_file.value = "segment.txt"
        press(controls.g_export)
        assert "let it end in .ply" in controls.a_status.text
        view.threshold = 1.1
        controls.f_file.value = "nothing.ply"
        press(controls.g_export)
        assert "No Gaussian is left" in controls.a_status.text and not path.with_name("nothing.ply").exists()
        browser.close()
    gaussians = read_ply(path)
    assert torch.equal(gaussians["means"], pipeline.model.means.detach()[chosen])
    assert torch.equal(gaussians["features_dc"], pipeline.model.features_dc.detach()[chosen])


def test_a_click_is_taken_in_the_browser_it_came_from(viewed_run):
    pipeline = viewed_run.pipeline
    poses = pipeline.datamanager.train_dataset.cameras.camera_to_worlds
    controls, view = pipeline.features, pipeline.feature_view
    with running_viewer(pipeline, viewed_run.base_dir) as viewer:
        browsers = [FakeBrowser(viewer, poses[0]), FakeBrowser(viewer, poses[6])]
        queries: list[torch.Tensor] = []
        for browser in browsers:
            clicked(controls, viewer, browser)
            viewer.viser_server.get_clients = lambda: dict(enumerate(browsers))
            alone: Any = view.query
            view.query = None
            origin = tuple(float(value) / 10 for value in browser.camera.position)
            controls._query(ViewerClick(origin=origin, direction=(0.0, 0.0, 1.0), screen_pos=(0.5, 0.5)))  # type: ignore[arg-type]
            assert view.query is not None and torch.equal(view.query, alone)
            queries.append(alone)
        assert not torch.allclose(queries[0], queries[1])
        for browser in browsers:
            browser.close()


def test_buttons_say_what_went_wrong(untrained, tmp_path, monkeypatch):
    controls, model = untrained.features, untrained.model
    with running_viewer(untrained, tmp_path) as viewer:
        browser = FakeBrowser(viewer, first_pose(untrained))
        model.gauss_params["opacities"].data.fill_(-20.0)
        assert clicked(controls, viewer, browser) == "There is nothing where you clicked: click on a surface."
        model.gauss_params["opacities"].data.fill_(6.0)
        assert "has no feature yet" in clicked(controls, viewer, browser)
        monkeypatch.setattr(untrained.feature_view, "compute_disagreement", lambda: 1 / 0)
        press(controls.i_variance)
        assert controls.a_status.text.startswith("That failed (ZeroDivisionError")
        browser.close()


def test_clusters_and_colours_are_fixed_until_refreshed(viewed_run):
    controls, view = viewed_run.pipeline.features, viewed_run.pipeline.feature_view
    centres, basis = view.centres(), view.colors().basis
    assert centres.shape == (8, 64)
    controls.h_clusters.value = 3
    press(controls.h_clusters)
    three = view.centres()
    assert three.shape == (3, 64) and view.centres() is three
    press(controls.b_refresh)
    assert view.centres() is not three and torch.equal(view.centres(), three)  # the features did not change
    again = view.colors().basis
    assert again is not basis and torch.equal(again.basis.components, basis.basis.components)


def test_variance_waits_for_its_button_in_a_browser(viewed_run):
    pipeline = viewed_run.pipeline
    with running_viewer(pipeline, viewed_run.base_dir) as viewer:
        browser = FakeBrowser(viewer, first_pose(pipeline))
        sentence = browser.look("view_variance")
        assert pipeline.feature_view._disagreement is None
        press(pipeline.features.i_variance)
        assert pipeline.features.a_status.text == "Choose the output `view_variance`."
        assert np.abs(browser.look("view_variance").astype(int) - sentence).mean() > 10
        browser.close()


def test_a_lifted_run_shows_what_its_record_holds(scene, make_config, make_trainer):
    trainer = make_trainer(make_config(scene, steps=6, features="lift"))
    trainer.train()
    trainer.config.save_config()
    pipeline = open_run(trainer.base_dir)
    view = pipeline.feature_view
    with running_viewer(pipeline, trainer.base_dir):
        stored = view._disagreement
        assert stored is not None and bool((stored.values > 0).any())
    view.compute_disagreement()
    assert torch.allclose(view.disagreement().values, stored.values, rtol=1e-3, atol=1e-3)
    (trainer.base_dir / "lift.safetensors").write_bytes(b"torn")
    pipeline = open_run(trainer.base_dir)
    with running_viewer(pipeline, trainer.base_dir):  # opens all the same
        assert pipeline.feature_view._disagreement is None


def test_a_port_in_use_is_said(viewed_run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running_viewer(viewed_run.pipeline, viewed_run.base_dir, websocket_port=port) as viewer:
            free = viewer.viser_server.get_port()
    said = " ".join(capsys.readouterr().err.split())
    assert free != port and f"The port {port} is in use: the viewer is at http://localhost:{free}." in said


@pytest.mark.parametrize("missing", ["scene", "photo"])
def test_a_run_whose_data_moved_opens_and_says_so(viewed_run, missing, capsys):
    data = viewed_run.pipeline.datamanager.get_datapath()
    expected = viewed_run.pipeline.model.get_outputs_for_camera(
        viewed_run.pipeline.datamanager.train_dataset.cameras[:1]
    )["feature_pca"]
    camera = viewed_run.pipeline.datamanager.train_dataset.cameras[:1]
    photo = viewed_run.pipeline.datamanager.train_dataset.image_filenames[2]
    if missing == "scene":
        shutil.move(data, data.with_name("elsewhere"))
    else:
        photo.unlink()
    pipeline = open_run(viewed_run.base_dir)
    name = str(data if missing == "scene" else photo)
    assert name in "".join(capsys.readouterr().err.split())
    assert torch.allclose(pipeline.model.get_outputs_for_camera(camera)["feature_pca"], expected, atol=1e-5)
    with running_viewer(pipeline, viewed_run.base_dir) as viewer:
        browser = FakeBrowser(viewer, camera.camera_to_worlds[0])
        assert np.abs(browser.look("teacher_pca").astype(int) - browser.look("feature_pca")).mean() > 10
        press(pipeline.features.i_variance)
        assert name in pipeline.features.a_status.text
        assert browser.alive
        browser.close()
    stored = torch.load(next(viewed_run.checkpoint_dir.glob("*.ckpt")), weights_only=True)["pipeline"]
    kept = pipeline.state_dict()["_extra_state"]
    for part in ("photos", "sampler", "teacher_identity"):
        assert kept[part] == stored["_extra_state"][part], part
    for use in (
        pipeline.get_average_eval_image_metrics,
        lambda: pipeline.datamanager.next_train(0),
        lambda: pipeline.datamanager.train_dataset.cameras,
        lambda: pipeline.feature_view.teacher.view(0),
    ):
        with pytest.raises(UserError, match=name):
            use()


def test_ns_viewer_opens_without_photos(viewed_run, monkeypatch):
    """Nerfstudio's command itself, up to the loop in which it waits."""

    class _Waits(Exception):
        pass

    def wait(_):
        raise _Waits

    shutil.rmtree(viewed_run.pipeline.datamanager.get_datapath())
    monkeypatch.setattr(run_viewer, "time", SimpleNamespace(sleep=wait))
    with pytest.raises(_Waits):
        run_viewer.RunViewer(viewed_run.base_dir / "config.yml").main()


@pytest.mark.parametrize("split", ["train", "test"])
def test_ns_render_of_photos_that_are_gone(viewed_run, tmp_path, split):
    scene = viewed_run.pipeline.datamanager.get_datapath()
    shutil.rmtree(scene)
    render = DatasetRender(viewed_run.base_dir / "config.yml", output_path=tmp_path / "renders", split=split)
    with pytest.raises(UserError, match=f"{scene}.*does not exist"):
        render.main()


def test_a_run_that_learned_about_its_views_opens_without_them(scene, make_config, make_trainer):
    config = make_config(scene, steps=3)
    config.pipeline.model.camera_optimizer.mode = "SO3xR3"
    trainer = make_trainer(config)
    trainer.train()
    trainer.save_checkpoint(2)
    trainer.config.save_config()
    learned = trainer.pipeline.model.camera_optimizer.pose_adjustment
    shutil.rmtree(scene)
    pipeline = open_run(trainer.base_dir)
    assert torch.equal(pipeline.model.camera_optimizer.pose_adjustment, learned)


def test_training_still_refuses_a_scene_that_is_not_there(scene, make_config, make_trainer):
    shutil.rmtree(scene)
    with pytest.raises(UserError, match="does not exist"):
        make_trainer(make_config(scene))


def test_clusters_find_directions():
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(3, 10)
    members = torch.arange(300) % 3
    points = (axes[members] + 0.05 * torch.randn(300, 10, generator=generator)) * torch.rand(
        300, 1, generator=generator
    )
    weights = torch.tensor([1.0, 5.0, 2.0])[members]
    centres = fit_clusters(points, weights, 3)
    assert torch.equal(centres, fit_clusters(points, weights, 3))
    labels = assign_clusters(points, centres)
    # The heaviest group comes first.
    assert torch.equal(labels, torch.tensor([2, 0, 1])[members])
    assert torch.equal(
        assign_clusters(torch.tensor([[0.0] * 10, [float("nan")] * 10]), centres), torch.full((2,), UNASSIGNED)
    )
    assert len(fit_clusters(points[:2], weights[:2], 5)) == 2
    assert torch.isfinite(fit_clusters(points[:1].repeat(9, 1), weights[:9], 5)).all()


def test_colours_are_those_of_exports(viewed_run):
    model = viewed_run.pipeline.model
    opacities = model.opacities.detach().sigmoid().squeeze(-1)
    view = viewed_run.pipeline.feature_view
    exported = SceneColors.fit(view.features, opacities, model.fit3d_decoder.weight)
    assert torch.equal(view.colors().kernel, exported.kernel)
    assert torch.equal(view.colors().bias, exported.bias)
    decoded = view.features @ model.fit3d_decoder.weight.detach().sum((2, 3)).T
    assert torch.allclose(exported.of_gaussians(view.features), exported.basis.to_rgb(decoded), atol=1e-3)
    space = FeatureSpace.of(model.fit3d_decoder)
    assert torch.allclose(space.decode(space.coordinates(view.features)), decoded, atol=1e-5)
