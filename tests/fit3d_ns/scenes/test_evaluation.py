"""Evaluation renders each held-out view once, keeps few of them, and nobody who looks on changes its numbers."""

import subprocess
import sys
import threading
import weakref
from copy import deepcopy

import pytest
import torch
from fake_browser import FakeBrowser, running_viewer
from solid_room import make_solid

from fit3d_ns.features.correspondences import correspondences
from fit3d_ns.scenes import evaluation
from fit3d_ns.scenes.views import resident_scene


@pytest.fixture
def half_held_out(scene, make_config, make_trainer):
    """The solid tiny room, 8 of its 16 views held out, in evaluation mode."""

    def make(**fields):
        config = make_config(scene, **fields)
        config.pipeline.datamanager.dataparser.eval_mode = "interval"
        config.pipeline.datamanager.dataparser.eval_interval = 2
        pipeline = make_trainer(config).pipeline
        make_solid(pipeline, scene)
        pipeline.eval()
        return pipeline

    return make


def test_each_view_is_rendered_once_and_few_are_kept(half_held_out, monkeypatch):
    pipeline = half_held_out()
    model = pipeline.model
    everything = pipeline.get_average_eval_image_metrics()
    pipeline.eval()
    renders, alive, most = [], [], 0
    render, decode = model.get_outputs, model.decode_view

    def counted(camera):
        renders.append("colours")
        return render(camera)

    def watched(*arguments):
        nonlocal most
        decoded = decode(*arguments)
        renders.append("features")
        alive.append(weakref.ref(decoded))
        most = max(most, sum(reference() is not None for reference in alive))
        return decoded

    monkeypatch.setattr(model, "get_outputs", counted)
    monkeypatch.setattr(model, "decode_view", watched)
    monkeypatch.setattr(evaluation, "MATCH_VIEWS", 3)
    few = pipeline.get_average_eval_image_metrics()
    assert sorted(renders) == 8 * ["colours"] + 8 * ["features"]
    assert most <= 3 + 2  # the ones that are compared, the one at hand and the one before
    assert few["feature_cosine"] == everything["feature_cosine"]  # of all views all the same
    assert model.on_measured is None


def test_the_means_are_of_the_views_that_have_any(half_held_out):
    pipeline = half_held_out()
    load, scores = pipeline.datamanager.evaluation_view, []

    def masked(index):
        camera, batch = load(index)
        if index % 2:
            batch["patch_weights"] = torch.zeros(batch["teacher"].shape[1:])
        return camera, batch

    pipeline.datamanager.evaluation_view = masked
    metrics = pipeline.get_average_eval_image_metrics(get_std=True)
    pipeline.eval()
    for index in range(0, 8, 2):
        camera, batch = load(index)
        decoded = pipeline.model.decode_view(camera).detach()
        scores.append(float((decoded - batch["teacher"].float()).abs().mean()))
    assert metrics["feature_l1"] == pytest.approx(float(torch.tensor(scores).mean()), rel=1e-5)
    assert metrics["feature_l1_std"] == pytest.approx(float(torch.tensor(scores).std()), rel=1e-4)


def test_training_views_are_matched_where_camera_optimization_moved_them(scene, make_config, make_trainer):
    """Maps and surfaces of one view must be of one pose."""
    config = make_config(scene)
    config.pipeline.model.camera_optimizer.mode = "SO3xR3"
    pipeline = make_trainer(config).pipeline
    make_solid(pipeline, scene)
    model = pipeline.model
    generator = torch.Generator().manual_seed(0)
    model.camera_optimizer.pose_adjustment.data.normal_(std=0.1, generator=generator)
    pipeline.eval()
    for item, camera in zip(
        resident_scene(pipeline.datamanager, model).training_surfaces, pipeline.datamanager.train_dataset.cameras
    ):
        surface = item.surface()
        assert torch.allclose(surface.viewmat, item.view.camera.viewmat, atol=1e-6)
        pose = torch.linalg.inv(surface.viewmat)[:3, 3]
        assert float((pose - camera.camera_to_worlds[:, 3]).norm()) > 1e-3  # it was moved
        same = deepcopy(surface)
        found = correspondences(surface, same, item.view.camera.grid, item.view.camera.grid)
        assert len(found) > 0


def test_a_viewer_changes_no_number_of_a_frozen_run(scene, make_config, make_trainer):
    """A crop box and a background colour are a browser's, and no metric sees them."""
    first = make_trainer(make_config(scene, steps=3))
    first.train()
    trainer = make_trainer(make_config(scene, steps=3, init_from=first.base_dir))
    pipeline = trainer.pipeline
    pipeline.model.optimizers = trainer.optimizers.optimizers

    def metrics():
        pipeline.train()
        camera, batch = pipeline.datamanager.evaluation_view(0)
        camera.metadata = {**camera.metadata, "cam_idx": 0}
        training = float(pipeline.model.get_metrics_dict(pipeline.model(camera), batch)["psnr"])
        pipeline.eval()
        held_out, _ = pipeline.model.get_image_metrics_and_images(pipeline.model.get_outputs_for_camera(camera), batch)
        return training, held_out["psnr"]

    before = metrics()
    with running_viewer(pipeline, trainer.base_dir) as viewer:
        panel = viewer.control_panel
        panel._crop_viewport.value, panel._crop_scale.value = True, (0.3, 0.3, 0.3)
        panel._background_color.value = (255, 0, 255)
        browser = FakeBrowser(viewer, pipeline.datamanager.train_dataset.cameras[0].camera_to_worlds)
        cropped = browser.look("rgb")
        assert (cropped == torch.tensor([255, 0, 255]).numpy()).all(-1).mean() > 0.05  # the browser's own colour
        browser.close()  # a picture that is still rendered would put the model back to training in between
        assert metrics() == before


def test_splatfacto_runs_on_the_cpu_in_several_threads_at_once():
    """What is patched for one render must not stay because another one was under way."""
    from nerfstudio.models import splatfacto

    from fit3d_ns import compat

    with compat.splatfacto_on(torch.device("cpu")):
        pass  # what is changed for good is changed now
    original, names = torch.Tensor.cuda, (splatfacto.rasterization, splatfacto.get_viewmat)
    entered, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with compat.splatfacto_on(torch.device("cpu")):
            entered.set()
            leave.wait(10)
            seen.append(torch.zeros(2).cuda().device.type)

    thread = threading.Thread(target=other)
    with compat.splatfacto_on(torch.device("cpu")):
        thread.start()
        assert entered.wait(10)
        assert torch.zeros(2).cuda().device.type == "cpu"
    leave.set()
    thread.join()
    assert seen == ["cpu"]
    assert torch.Tensor.cuda is original and names == (splatfacto.rasterization, splatfacto.get_viewmat)


def test_exports_and_lifting_load_no_viewer():
    """The model knows nobody who looks at it."""
    code = (
        "import sys, fit3d_ns.model, fit3d_ns.commands.export.cli, fit3d_ns.commands.export.trained_run, "
        "fit3d_ns.scenes.lift, fit3d_ns.scenes.evaluation; "
        "print([name for name in sys.modules if name.startswith('fit3d_ns.viewer')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
