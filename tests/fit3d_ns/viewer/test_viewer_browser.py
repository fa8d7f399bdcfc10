"""The viewer in headless Chromium, on a trained run and while one trains. Pictures stay in outputs/viewer_test."""

import threading
from pathlib import Path

import numpy as np
import pytest
import viewer_page
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from PIL import Image

from fit3d_ns.viewer.outputs import PICTURES

pytestmark = pytest.mark.browser


@pytest.fixture
def keep(pytestconfig):
    """Writes a picture to where it can be looked at afterwards."""
    folder = Path(pytestconfig.rootpath) / "outputs" / "viewer_test"
    folder.mkdir(parents=True, exist_ok=True)

    def write(name, picture):
        Image.fromarray(picture).save(folder / f"{name}.png")
        return picture

    return write


def difference(left, right):
    """Mean difference of two pictures, in [0, 255]."""
    return float(np.abs(left.astype(int) - right).mean())


def assert_shows_something(picture):
    assert picture.std() > 10, "blank"
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 300


def test_every_output_click_and_segment_in_two_browsers(scene, make_config, make_trainer, keep):
    trainer = make_trainer(make_config(scene, steps=150, feature_interval=1, stop_split_at=0))
    trainer.train()
    pipeline = trainer.pipeline
    pipeline.eval()
    with viewer_page.running_viewer(pipeline, trainer.base_dir) as viewer, viewer_page.browser() as open_viewer:
        viewer.control_panel._max_res.value = 256
        page = open_viewer(viewer_page.address(viewer))
        page.press("Hide Train Cams")  # the photo of the one we stand at would be before the pictures
        viewer_page.stand_at(viewer, 3)
        pictures = {"rgb": keep("rgb", page.settled())}
        page.press("Compute view variance")
        page.wait_for_text("Choose the output view_variance")
        page.press("Click to query")
        page.wait_for_text("Click on the scene.")
        page.click_scene(0.5, 0.6)
        page.wait_for_text("are similar to the clicked point")
        assert pipeline.feature_view.query is not None
        for name in PICTURES:
            page.choose(name)
            pictures[name] = keep(name, page.settled())
        for name, picture in pictures.items():
            assert_shows_something(picture)
            for other, its_picture in pictures.items():
                assert name == other or difference(picture, its_picture) > 1, (name, other)
        similar = pictures["similarity"]
        row, column = int(0.6 * len(similar)), similar.shape[1] // 2
        around = similar[row - 40 : row + 40, column - 40 : column + 40].astype(int)
        assert np.median(np.ptp(around, axis=2)) > 60  # heat, where all that is dissimilar is grey

        second = open_viewer(viewer_page.address(viewer))
        page.choose("feature_pca")
        page.settled()
        viewer_page.stand_at(viewer, 6)
        away = keep("feature_pca_elsewhere", page.settled())
        assert difference(away, second.settled()) < 2
        viewer_page.stand_at(viewer, 3)
        assert difference(away, pictures["feature_pca"]) > 5
        assert difference(page.settled(), pictures["feature_pca"]) < 1  # the same colours after all that

        page.choose("rgb")
        page.tick("Segment by similarity")
        segment = keep("segment", page.settled())
        assert difference(segment, pictures["rgb"]) > 5
        page.press("Export segment")
        page.wait_for_text("Gaussians are in")
        assert (trainer.base_dir / "segment.ply").stat().st_size > 1000
        assert len(viewer.render_statemachines) == 2
        assert all(thread.is_alive() for thread in viewer.render_statemachines.values())


class _LookedEnough(Exception):
    """Ends a training."""


def test_looking_while_training(scene, make_config, make_trainer, keep):
    config = make_config(scene, steps=100_000, stop_split_at=40)
    config.vis, config.viewer.websocket_host = "viewer", "127.0.0.1"
    config.save_config()
    trainer = make_trainer(config)
    viewer = trainer.viewer_state
    pictures, failures, looked = {}, [], threading.Event()

    def look():
        try:
            with viewer_page.browser() as open_viewer:
                page = open_viewer(viewer_page.address(viewer))
                page.press("Hide Train Cams")
                viewer_page.stand_at(viewer, 3)
                for name in [*PICTURES, "rgb"]:
                    page.choose(name)
                    page.page.wait_for_timeout(1500)
                    pictures[name] = page.picture()
                page.press("Refresh PCA")
                page.wait_for_text("Colours and clusters follow")
                pictures["steps"] = trainer.viewer_state.step
                assert all(thread.is_alive() for thread in viewer.render_statemachines.values())
        except BaseException as error:
            failures.append(error)
        looked.set()

    def stop(step):
        if looked.is_set():
            raise _LookedEnough

    trainer.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], stop))
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        with pytest.raises(_LookedEnough):
            trainer.train()
    finally:
        watcher.join(timeout=900)
        viewer.viser_server.stop()
    assert not failures, failures
    assert pictures.pop("steps") > 20
    for name, picture in pictures.items():
        assert_shows_something(keep(f"training_{name}", picture))
    assert difference(pictures["feature_pca"], pictures["rgb"]) > 5
