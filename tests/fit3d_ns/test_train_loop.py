"""Our method from nerfstudio's list in nerfstudio's own loop, as its `tests/test_train.py` runs the others.

Two steps on a Blender scene of one photo, without seed points, on the CPU; and on how many threads it runs.
"""

import json
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.scripts.train import train_loop
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fit3d_ns.runs.checkpoints import read_checkpoint

STEPS = 2


@pytest.fixture
def photo_scene(tmp_path):
    """One photo to train on and one to evaluate on, of transparent background, from four units above and beside."""
    folder = tmp_path / "lego"
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 4), dtype=np.uint8)
    pixels[:8, :, 3] = 0
    above = np.eye(4)  # looks along -z
    above[2, 3] = 4.0
    beside = np.array([[0, 0, 1, 4.0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # looks along -x
    for split, pose in (("train", above), ("val", beside)):
        (folder / split).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / split / "r_0.png")
        frames = [{"file_path": f"./{split}/r_0", "transform_matrix": pose.tolist()}]
        text = json.dumps({"camera_angle_x": 0.6911, "frames": frames})
        (folder / f"transforms_{split}.json").write_text(text)
    return folder


def test_nerfstudios_loop_trains_our_method_on_one_photo(photo_scene, tmp_path, teacher_weights):
    config = deepcopy(all_methods["fit3d-splat"])
    config.machine.device_type = "cpu"
    config.mixed_precision = config.use_grad_scaler = False
    config.max_num_iterations = STEPS
    config.pipeline.datamanager.dataparser = BlenderDataParserConfig(data=photo_scene)
    config.pipeline.datamanager.backbone = "test_vit"
    config.pipeline.datamanager.backbone_weights = teacher_weights
    config.pipeline.model.num_random, config.pipeline.model.random_scale = 200, 2.0
    config.vis = "tensorboard"
    config.logging.relative_log_dir = tmp_path
    config.viewer.quit_on_train_completion = True
    config.output_dir = tmp_path / "outputs"
    config.set_timestamp()

    train_loop(local_rank=0, world_size=0, config=config)

    (checkpoint,) = config.get_checkpoint_dir().glob("*.ckpt")
    assert checkpoint.name == f"step-{STEPS - 1:09d}.ckpt"
    state = read_checkpoint(checkpoint)["pipeline"]
    assert all(bool(value.isfinite().all()) for value in state.values() if torch.is_tensor(value))
    assert len(state["_model.gauss_params.means"]) == config.pipeline.model.num_random
    assert bool(state["_model.gauss_params.fit3d_features"].any())


@pytest.mark.parametrize("steps_per_log", [1, 3])
def test_what_nerfstudio_logs_is_measured(scene, make_config, make_trainer, steps_per_log):
    """Metrics of other steps are not, since they take a tenth of a step on a GPU."""
    config = make_config(scene, steps=7)
    config.logging.steps_per_log, config.pipeline.model.feature_interval = steps_per_log, 1
    trainer = make_trainer(config)
    model, measured = trainer.pipeline.model, []
    measure = model.psnr.forward
    model.psnr.forward = lambda *images: measured.append(model.step) or measure(*images)
    trainer.train()
    log = EventAccumulator(str(trainer.base_dir)).Reload()
    for name in ("psnr", "feature_cosine"):
        assert [event.step for event in log.Scalars(f"Train Metrics Dict/{name}")] == [*range(0, 7, steps_per_log)]
    assert measured == [*range(0, 7, steps_per_log)]


@pytest.mark.parametrize("command, wanted", [("ns-train", 1), ("my_training.py", 2)])
def test_small_photos_train_on_one_thread_of_torchs(
    command, wanted, scene, make_config, make_trainer, monkeypatch, tmp_path
):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / command)])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trainer = make_trainer(make_config(scene, steps=2))
        seen = []
        get_outputs = trainer.pipeline.model.get_outputs
        monkeypatch.setattr(
            trainer.pipeline.model,
            "get_outputs",
            lambda camera: (seen.append(torch.get_num_threads()), get_outputs(camera))[1],
        )
        trainer.train()
        assert len(seen) >= 2 and set(seen) == {wanted}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
