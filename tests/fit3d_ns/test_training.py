"""Stage one on the tiny room, in this process: separation, densification, resume, geometry of patches."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from PIL import Image
from plain_splatfacto import PlainSplatfacto

from fit3d_ns import compat
from fit3d_ns.features.metrics import feature_l1
from fit3d_ns.support.errors import UserError

GEOMETRY = ("means", "scales", "quats", "opacities", "features_dc", "features_rest")


def parameters_of(pipeline):
    """All trained tensors of a model, by name."""
    return {name: tensor.detach().clone() for name, tensor in pipeline.model.named_parameters()}


def parameters(trainer):
    """All trained tensors of a run, by name."""
    return parameters_of(trainer.pipeline)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("grid", ["fast", "paper"])
def test_losses_share_no_parameter(scene, make_config, make_trainer, grid):
    trainer = make_trainer(make_config(scene, feature_grid=grid, feature_init="random"))
    pipeline = trainer.pipeline
    pipeline.train()
    model = pipeline.model
    for loss_name, reached in (("feature_loss", False), ("main_loss", True)):
        model.step = 3000  # higher spherical harmonics are active
        camera, batch = pipeline.datamanager.next_train(0)
        model.optimizers = trainer.optimizers.optimizers
        outputs = model(camera)
        losses = model.get_loss_dict(outputs, batch)
        model.zero_grad(set_to_none=True)
        losses[loss_name].backward()
        for name in GEOMETRY:
            gradient = model.gauss_params[name].grad
            assert (gradient is not None and bool(gradient.any())) == reached, (loss_name, name)
        for parameter in (model.gauss_params["fit3d_features"], model.fit3d_decoder.weight):
            assert (parameter.grad is not None and bool(parameter.grad.any())) != reached, loss_name


def test_geometry_is_splatfactos_bit_for_bit(scene, make_config, make_trainer):
    """Same seed, with and without features, through clone, split, prune and opacity reset."""
    steps = 62
    ours = make_trainer(make_config(scene, steps=steps, densify_grad_thresh=2e-4))
    start = ours.pipeline.model.num_points
    counts = []
    ours.pipeline.model.strategy.verbose = False
    ours.train()
    counts.append(ours.pipeline.model.num_points)

    config = make_config(scene, method="splatfacto", steps=steps, densify_grad_thresh=2e-4)
    config.pipeline = VanillaPipelineConfig(
        datamanager=FullImageDatamanagerConfig(
            data=scene,
            cache_images="gpu",
            cache_images_type="uint8",
            dataparser=NerfstudioDataParserConfig(load_3D_points=True),
        ),
        model=config.pipeline.model,
    )
    config.pipeline.model._target = PlainSplatfacto
    plain = make_trainer(config)
    plain.pipeline.model.strategy.verbose = False
    plain.train()
    assert counts[0] != start  # the run did densify
    left, right = parameters(ours), parameters(plain)
    for name in right:
        assert torch.equal(left[name], right[name]), name


def test_feature_rows_stay_with_their_gaussians(scene, make_config, make_trainer):
    """Rows are tagged with a number, in the features and in the colour; both are kept from training."""
    config = make_config(scene, steps=62, densify_grad_thresh=2e-4)
    for name in ("fit3d_features", "features_dc"):
        config.optimizers[name]["optimizer"].lr = 0.0
    trainer = make_trainer(config)
    model = trainer.pipeline.model
    start = model.num_points
    tags = torch.arange(start, dtype=torch.float32)
    model.gauss_params["fit3d_features"].data[:, 3] = tags
    model.gauss_params["features_dc"].data[:, 1] = tags
    trainer.train()
    after = model.gauss_params["fit3d_features"][:, 3]
    assert torch.equal(after, model.gauss_params["features_dc"][:, 1])
    counts = torch.bincount(after.long(), minlength=start)
    assert (counts > 1).any() and (counts == 0).any()  # some were cloned or split, some pruned


def test_resume_equals_uninterrupted(scene, make_config, make_trainer):
    steps, half = 64, 37
    uninterrupted = make_trainer(make_config(scene, steps=steps, densify_grad_thresh=2e-4))
    uninterrupted.train()

    first = make_trainer(make_config(scene, steps=half, densify_grad_thresh=2e-4))
    first.train()
    config = make_config(scene, steps=steps, densify_grad_thresh=2e-4)
    config.load_dir = first.checkpoint_dir
    second = make_trainer(config, seed=99)  # its own randomness must not matter
    model = second.pipeline.model
    assert second.optimizers.optimizers["means"].param_groups[0]["params"][0] is model.gauss_params["means"]
    second.train()
    assert second.step == steps - 1
    assert_equal(parameters(uninterrupted), parameters(second))
    state = uninterrupted.pipeline.model.strategy_state
    assert torch.equal(state["grad2d"], second.pipeline.model.strategy_state["grad2d"])


def test_finished_run_is_not_trained_again(scene, make_config, make_trainer):
    first = make_trainer(make_config(scene, steps=2))
    first.train()
    config = make_config(scene, steps=2)
    config.load_dir = first.checkpoint_dir
    with pytest.raises(UserError, match="--max-num-iterations"):
        make_trainer(config)


def test_checkpoint_loads_with_torchs_restricted_loader_and_no_whitelist(scene, make_config, make_trainer):
    trainer = make_trainer(make_config(scene, steps=2))
    trainer.train()
    (checkpoint,) = trainer.checkpoint_dir.glob("*.ckpt")
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        state = torch.load(checkpoint, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)
    assert not any("lpips" in name for name in state["pipeline"])
    assert state["pipeline"]["_extra_state"]["teacher_identity"]["name"].startswith("test_vit")


def test_kill_while_saving_leaves_the_previous_checkpoint(scene, make_config, make_trainer, monkeypatch):
    trainer = make_trainer(make_config(scene, steps=2))
    trainer.train()
    before = sorted(path.name for path in trainer.checkpoint_dir.glob("*"))

    def torn(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(7)
    assert sorted(path.name for path in trainer.checkpoint_dir.glob("*")) == before


def test_what_a_kill_left_is_removed_and_a_full_disk_is_one_sentence(scene, make_config, make_trainer):
    config = make_config(scene, steps=1)
    config.set_experiment_name()
    left = config.get_base_dir() / ".checkpoint-killed.tmp"
    left.mkdir(parents=True)
    (left / "step-000000000.ckpt").write_bytes(b"half")
    trainer = make_trainer(config)
    assert not left.exists()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="Cannot write .*step-000000003.ckpt.*free space"):
            trainer.save_checkpoint(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(trainer.base_dir.glob(".checkpoint-*")) and not list(trainer.checkpoint_dir.iterdir())
    trainer.save_checkpoint(3)
    assert [path.name for path in trainer.checkpoint_dir.iterdir()] == ["step-000000003.ckpt"]


@pytest.mark.parametrize("strategy", ["random", "fps"])
def test_sampler_of_fewer_views_is_left_aside(scene, make_config, make_trainer, strategy):
    def manager(share):
        config = make_config(scene)
        config.pipeline.datamanager.train_cameras_sampling_strategy = strategy
        config.pipeline.datamanager.dataparser.train_split_fraction = share
        return make_trainer(config).pipeline.datamanager

    fewer, more = manager(0.6), manager(0.9)
    before = more.sampler_state()
    more.load_sampler_state(fewer.sampler_state())
    assert more.sampler_state() == before
    more.next_train(0)


@pytest.mark.parametrize("change, flag", [({"feature_dim": 5}, "feature-dim"), ({"feature_grid": "paper"}, "grid")])
def test_checkpoint_of_another_kind_is_refused(scene, make_config, make_trainer, change, flag):
    first = make_trainer(make_config(scene, steps=1))
    first.train()
    config = make_config(scene, steps=5, **change)
    config.load_dir = first.checkpoint_dir
    with pytest.raises(UserError, match=flag):
        make_trainer(config)


def test_checkpoint_of_another_teacher_is_refused(scene, make_config, make_trainer):
    first = make_trainer(make_config(scene, steps=1))
    first.train()
    config = make_config(scene, steps=5)
    config.load_dir = first.checkpoint_dir
    config.pipeline.datamanager.backbone_layer = 1
    with pytest.raises(UserError, match="backbone_layer"):
        make_trainer(config)


def resumed(make_config, scene, first, **fields):
    """The configuration of a run that goes on where the first one stopped."""
    config = make_config(scene, steps=5, **fields)
    config.load_dir = first.checkpoint_dir
    return config


def test_resume_with_other_weights_is_refused(scene, tmp_path, teacher_weights, make_config, make_trainer):
    from safetensors.torch import load_file, save_file

    first = make_trainer(make_config(scene, steps=1))
    first.train()
    tensors = load_file(teacher_weights)
    name = next(name for name in tensors if tensors[name].is_floating_point())
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "other.safetensors")
    config = resumed(make_config, scene, first)
    config.pipeline.datamanager.backbone_weights = tmp_path / "other.safetensors"
    with pytest.raises(UserError, match="other weights of test_vit.*backbone-weights"):
        make_trainer(config)


@pytest.mark.parametrize(
    "flags, message",
    [({"scale_factor": 0.5}, "coordinates"), ({"eval_mode": "interval", "eval_interval": 4}, "trained on .* photos")],
)
def test_resume_with_other_dataparser_flags_is_refused(scene, make_config, make_trainer, flags, message):
    first = make_trainer(make_config(scene, steps=1, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3")))
    first.train()
    config = resumed(make_config, scene, first, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    for name, value in flags.items():
        setattr(config.pipeline.datamanager.dataparser, name, value)
    with pytest.raises(UserError, match=message):
        make_trainer(config)


def test_resume_with_other_model_flags_is_refused(scene, make_config, make_trainer):
    config = make_config(scene, steps=1)
    config.save_config()
    first = make_trainer(config)
    first.train()
    stored = (first.base_dir / "config.yml").read_text()
    for change, flag in (
        ({"camera_optimizer": CameraOptimizerConfig(mode="SO3xR3")}, "camera-optimizer.mode off .now SO3xR3"),
        ({"sh_degree": 2}, "sh-degree 3 .now 2"),
        ({"use_bilateral_grid": True}, "use-bilateral-grid False .now True"),
        ({"features": "lift"}, "features joint .now lift"),
        ({"init_from": first.base_dir}, "init-from not given .now given"),
    ):
        again = resumed(make_config, scene, first, **change)
        again.timestamp = config.timestamp  # it would overwrite the configuration that it is compared with
        with pytest.raises(UserError, match=f"trained with --pipeline.model.{flag}"):
            again.save_config()
        assert (first.base_dir / "config.yml").read_text() == stored


@pytest.mark.parametrize("damage", ["half", "steps"])
def test_a_resume_that_fails_leaves_the_configuration_as_it_was(scene, make_config, make_trainer, damage):
    config = make_config(scene, steps=1)
    config.save_config()
    first = make_trainer(config)
    first.train()
    stored = (first.base_dir / "config.yml").read_text()
    again = resumed(make_config, scene, first)
    again.timestamp, again.steps_per_save = config.timestamp, 7
    if damage == "half":
        (checkpoint,) = first.checkpoint_dir.glob("*.ckpt")
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    else:
        again.max_num_iterations = 1
    with pytest.raises(UserError):
        again.save_config()
        make_trainer(again)
    assert (first.base_dir / "config.yml").read_text() == stored


def test_a_resume_that_succeeds_writes_its_configuration(scene, make_config, make_trainer):
    config = make_config(scene, steps=1)
    config.save_config()
    first = make_trainer(config)
    first.train()
    again = resumed(make_config, scene, first)
    again.timestamp, again.steps_per_save, again.max_num_iterations = config.timestamp, 7, 3
    again.save_config()
    make_trainer(again)
    text = (first.base_dir / "config.yml").read_text()
    assert "steps_per_save: 7" in text and "max_num_iterations: 3" in text


def test_resume_of_a_run_that_moved_with_other_settings_of_no_consequence(scene, make_config, make_trainer, tmp_path):
    import shutil

    config = make_config(scene, steps=1)
    config.save_config()
    make_trainer(config).train()
    moved = Path(shutil.copytree(config.get_base_dir(), tmp_path / "moved"))
    scene = Path(shutil.move(scene, tmp_path / "moved-scene"))
    again = make_config(scene, steps=3)
    again.load_dir, again.steps_per_save, again.vis = moved / "nerfstudio_models", 1, "viewer+tensorboard"
    again.save_config()
    again.vis = "tensorboard"
    trainer = make_trainer(again)
    trainer.train()
    assert trainer.step == 2


def test_plain_splatfacto_checkpoint_is_refused_with_advice(scene, make_config, make_trainer):
    first = make_trainer(make_config(scene, steps=1))
    first.train()
    (checkpoint,) = first.checkpoint_dir.glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    state["pipeline"] = {name: value for name, value in state["pipeline"].items() if "fit3d" not in name}
    torch.save(state, checkpoint)
    config = make_config(scene, steps=5)
    config.load_dir = first.checkpoint_dir
    with pytest.raises(UserError, match="init-from"):
        make_trainer(config)


def test_init_from_freezes_geometry_and_trains_features(scene, make_config, make_trainer):
    first = make_trainer(make_config(scene, steps=12))
    first.train()
    geometry = parameters(first)
    second = make_trainer(make_config(scene, steps=10, init_from=first.checkpoint_dir.parent))
    before = parameters(second)
    second.train()
    after = parameters(second)
    for name in GEOMETRY:
        assert torch.equal(after[f"gauss_params.{name}"], geometry[f"gauss_params.{name}"]), name
    assert not torch.equal(after["fit3d_decoder.weight"], before["fit3d_decoder.weight"])
    assert after["gauss_params.fit3d_features"].any()


def test_run_with_taken_over_geometry_opens_without_the_run_it_came_from(scene, make_config, make_trainer):
    import shutil

    from nerfstudio.utils.eval_utils import eval_setup

    first = make_trainer(make_config(scene, steps=2))
    first.train()
    config = make_config(scene, steps=2, init_from=first.checkpoint_dir.parent)
    config.save_config()
    second = make_trainer(config)
    second.train()
    shutil.rmtree(first.checkpoint_dir)
    _, pipeline, _, _ = eval_setup(second.base_dir / "config.yml")
    expected = parameters(second)["gauss_params.means"]
    assert torch.equal(parameters_of(pipeline)["gauss_params.means"].cpu(), expected)


def test_stored_paths_are_absolute(scene, make_config, monkeypatch):
    import yaml

    monkeypatch.chdir(scene.parent)
    config = make_config(scene.relative_to(scene.parent))
    for holder, name in (
        (config, "output_dir"),
        (config.pipeline.datamanager, "feature_cache_dir"),
        (config.pipeline.model, "init_from"),
    ):
        setattr(holder, name, scene.relative_to(scene.parent) / name)
    config.save_config()
    stored = (config.get_base_dir() / "config.yml").read_text()
    monkeypatch.chdir("/")
    loaded = yaml.load(stored, Loader=yaml.Loader)
    assert loaded.pipeline.datamanager.data == scene
    assert loaded.output_dir == scene / "output_dir"
    assert loaded.pipeline.datamanager.feature_cache_dir == scene / "feature_cache_dir"
    assert loaded.pipeline.model.init_from == scene / "init_from"


@pytest.mark.parametrize("mode", ["SO3xR3", "off"])
def test_init_from_takes_over_what_was_learned_about_the_cameras(scene, make_config, make_trainer, caplog, mode):
    first = make_trainer(make_config(scene, steps=3, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3")))
    first.train()
    learned = first.pipeline.model.camera_optimizer.pose_adjustment.detach()
    assert learned.any()
    run = first.checkpoint_dir.parent
    config = make_config(scene, steps=1, init_from=run, camera_optimizer=CameraOptimizerConfig(mode=mode))
    model = make_trainer(config).pipeline.model
    said = "was trained with camera optimization; features are lifted at the original poses" in caplog.text
    assert said == (mode == "off")
    if mode == "SO3xR3":
        assert torch.equal(model.camera_optimizer.pose_adjustment.detach(), learned)


def test_init_from_refuses_other_coordinates(scene, make_config, make_trainer):
    first = make_trainer(make_config(scene, steps=1))
    first.train()
    config = make_config(scene, steps=1, init_from=first.checkpoint_dir.parent)
    config.pipeline.datamanager.dataparser.scale_factor = 0.5
    with pytest.raises(UserError, match="coordinates"):
        make_trainer(config)


@pytest.mark.parametrize("images", [16, 1900, 1901, 2500, 2800, 2801, 2899, 2900, 3100, 5000])
def test_scene_of_thousands_of_images_still_densifies(scene, make_config, make_trainer, images):
    """Geometry is splatfacto's to the last bit, unless its pause would stop densification for good."""
    model = make_trainer(make_config(scene, refine_every=100, reset_alpha_every=30)).pipeline.model
    pause = images + model.config.refine_every  # what splatfacto sets
    assert model.strategy.pause_refine_after_reset == pause - images + model.num_train_data

    def refinements(pause):
        return [step for step in range(3000, 6000, 100) if step % 3000 >= pause]

    model.strategy.pause_refine_after_reset = pause
    shortened = compat.clamp_refinement_pause(model.strategy)
    assert shortened == (not refinements(pause)) == (images > 2800)
    if shortened:
        assert len(refinements(model.strategy.pause_refine_after_reset)) == 10
    else:
        assert model.strategy.pause_refine_after_reset == pause


@pytest.mark.parametrize("interval, trained", [(0, None), (-1, None), (1, 4), (3, 2)])
def test_features_are_trained_at_every_nth_step(scene, make_config, make_trainer, interval, trained):
    config = make_config(scene, feature_interval=interval)
    if trained is None:
        with pytest.raises(UserError, match=f"--pipeline.model.feature-interval {interval} is out of range"):
            make_trainer(config)
        return
    trainer = make_trainer(config)
    model, pipeline = trainer.pipeline.model, trainer.pipeline
    model.optimizers = trainer.optimizers.optimizers
    pipeline.train()
    count = 0
    for model.step in range(4):
        camera, batch = pipeline.datamanager.next_train(model.step)
        count += "fit3d_decoded" in model(camera)
    assert count == trained


def test_evaluation_reports_features_and_consistency(scene, make_config, make_trainer):
    trainer = make_trainer(make_config(scene, steps=3))
    trainer.train()
    metrics = trainer.pipeline.get_average_eval_image_metrics(get_std=True)
    assert {"psnr", "ssim", "feature_l1", "feature_cosine", "feature_cosine_std"} <= metrics.keys()
    assert -1 <= metrics["feature_cosine"] <= 1 and metrics["feature_l1"] > 0
    assert not any("lpips" in name for name in metrics) or np.isfinite(metrics["lpips"])
    for name in ("view_match_teacher", "view_match_lifted"):
        assert name not in metrics or 0 <= metrics[name] <= 1


def test_masked_out_view_does_not_spoil_the_means(scene, make_config, make_trainer):
    config = make_config(scene)
    config.pipeline.datamanager.dataparser.eval_mode = "interval"
    config.pipeline.datamanager.dataparser.eval_interval = 5
    pipeline = make_trainer(config).pipeline
    whole = pipeline.get_average_eval_image_metrics(get_std=True)
    load, means = pipeline.datamanager.evaluation_view, []

    def masked(index):
        camera, batch = load(index)
        if index == 0:
            batch["patch_weights"] = torch.zeros(batch["teacher"].shape[1:])
        else:
            means.append(float(feature_l1(pipeline.model.decode_view(camera).detach(), batch["teacher"].float())))
        return camera, batch

    pipeline.datamanager.evaluation_view = masked
    metrics = pipeline.get_average_eval_image_metrics(get_std=True)
    assert metrics["feature_l1"] == pytest.approx(np.mean(means)) != pytest.approx(whole["feature_l1"])
    assert all(np.isfinite(metrics[name]) for name in metrics if name.startswith("feature_cosine"))


def test_masks_reach_both_losses(scene, make_config, make_trainer):
    """What a mask hides may change at will."""

    def losses(damage):
        transforms = json.loads((scene / "transforms.json").read_text())
        (scene / "masks").mkdir(exist_ok=True)
        for frame in transforms["frames"]:
            name = frame["file_path"].split("/")[-1].split(".")[0]
            mask = np.zeros((72, 96), np.uint8)
            mask[:, 32:] = 255
            Image.fromarray(mask).save(scene / "masks" / f"{name}.png")
            frame["mask_path"] = f"masks/{name}.png"
        (scene / "transforms.json").write_text(json.dumps(transforms))
        trainer = make_trainer(make_config(scene))
        trainer.pipeline.train()
        camera, batch = trainer.pipeline.datamanager.next_train(0)
        model = trainer.pipeline.model
        model.optimizers = trainer.optimizers.optimizers
        assert batch["patch_weights"][:, :2].sum() == 0 and batch["patch_weights"][:, 2:].min() == 1
        if damage:
            batch["teacher"] = batch["teacher"].clone()
            batch["teacher"][:, :, :2] = 50.0
            batch["image"] = batch["image"].clone()
            batch["image"][:, :32] = 255
        return {name: float(value) for name, value in model.get_loss_dict(model(camera), batch).items()}

    assert losses(damage=False) == losses(damage=True)


def test_fully_masked_view_gives_a_finite_loss(scene, make_config, make_trainer):
    trainer = make_trainer(make_config(scene))
    trainer.pipeline.train()
    camera, batch = trainer.pipeline.datamanager.next_train(0)
    model = trainer.pipeline.model
    model.optimizers = trainer.optimizers.optimizers
    batch["patch_weights"] = torch.zeros(batch["teacher"].shape[1:])
    loss = model.get_loss_dict(model(camera), batch)["feature_loss"]
    loss.backward()
    assert loss == 0 and torch.isfinite(model.fit3d_decoder.weight.grad).all()


@pytest.mark.parametrize("grid", ["fast", "paper"])
def test_patch_centres_of_render_and_teacher_agree(scene, make_config, make_trainer, grid):
    """A small Gaussian at a patch's centre must light up that patch most, in every corner of the image."""
    trainer = make_trainer(make_config(scene, feature_grid=grid))
    model, datamanager = trainer.pipeline.model, trainer.pipeline.datamanager
    camera, batch = datamanager.evaluation_view(0)
    rows, columns = batch["teacher"].shape[1:]
    model.eval()
    height, width = int(camera.height), int(camera.width)
    i, j = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    x = (j.flatten() * width / columns - camera.cx.item()) / camera.fx.item()
    y = (i.flatten() * height / rows - camera.cy.item()) / camera.fy.item()
    directions = torch.stack([x, -y, -torch.ones_like(x)], dim=-1) * 0.7
    pose = camera.camera_to_worlds[0]
    means = directions @ pose[:, :3].T + pose[:, 3]
    count = len(means)
    weight = torch.zeros_like(model.fit3d_decoder.weight)
    weight[:, :, 1, 1] = torch.eye(weight.shape[0], weight.shape[1])
    model.fit3d_decoder.weight.data = weight
    for index in range(count):
        model.gauss_params["means"].data = means[index : index + 1]
        model.gauss_params["scales"].data = torch.full((1, 3), -6.0)
        model.gauss_params["quats"].data = torch.tensor([[1.0, 0, 0, 0]])
        model.gauss_params["opacities"].data = torch.full((1, 1), 10.0)
        model.gauss_params["fit3d_features"].data = torch.ones(1, 8)
        decoded = model.decode_view(camera)[0].detach()
        assert int(decoded.argmax()) == index
        assert decoded.flatten()[index] > 4 * (decoded.sum() - decoded.flatten()[index])


@contextmanager
def _distorted(scene, k1):
    """Bends the photos of a scene as a lens with radial distortion would, and says so in transforms.json."""
    transforms = json.loads((scene / "transforms.json").read_text())
    intrinsics = np.array(
        [[transforms["fl_x"], 0, transforms["cx"] - 0.5], [0, transforms["fl_y"], transforms["cy"] - 0.5], [0, 0, 1.0]]
    )
    height, width = transforms["h"], transforms["w"]
    grid = np.stack(np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)), -1)
    straight = cv2.undistortPoints(grid.reshape(-1, 1, 2), intrinsics, np.array([k1, 0, 0, 0.0]), P=intrinsics)
    lookup = straight.reshape(height, width, 2).astype(np.float32)
    for frame in transforms["frames"]:
        path = scene / frame["file_path"]
        bent = cv2.remap(np.asarray(Image.open(path).convert("RGB")), lookup[..., 0], lookup[..., 1], cv2.INTER_LINEAR)
        Image.fromarray(bent).save(path)
    transforms["camera_model"], transforms["k1"] = "OPENCV", k1
    (scene / "transforms.json").write_text(json.dumps(transforms))
    yield


def test_teacher_sees_what_the_camera_renders_with_a_distorted_lens(scene, make_config, make_trainer):
    """Seed points, projected by the camera that is rendered, must have the colours of the photo the teacher saw."""
    from fit3d_ns.data.photos.masks import composite_on_black

    def colour_error(image, camera, points, colours):
        pose = camera.camera_to_worlds[0]
        local = (points - pose[:, 3]) @ pose[:, :3]
        x = local[:, 0] / -local[:, 2] * camera.fx.item() + camera.cx.item()
        y = -local[:, 1] / -local[:, 2] * camera.fy.item() + camera.cy.item()
        height, width = image.shape[:2]
        seen = (local[:, 2] < 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        return (image[y[seen].long(), x[seen].long()].float() - colours[seen].float()).abs().median().item()

    with _distorted(scene, k1=-0.25):
        trainer = make_trainer(make_config(scene))
    datamanager = trainer.pipeline.datamanager
    metadata = datamanager.train_dataparser_outputs.metadata
    points, colours = metadata["points3D_xyz"], metadata["points3D_rgb"]
    errors, wrong = [], []
    for index in range(len(datamanager.eval_dataset)):
        camera, batch = datamanager.evaluation_view(index)
        image = composite_on_black(batch["image"])
        assert image.shape[:2] == (int(camera.height), int(camera.width))
        errors.append(colour_error(image, camera, points, colours))
        bent = torch.from_numpy(np.asarray(Image.open(datamanager.eval_dataset.image_filenames[index])).copy())
        wrong.append(colour_error(bent, camera, points, colours))
    assert np.mean(errors) < 0.8 * np.mean(wrong)


def test_transparent_photos_weigh_patches(scene, make_config, make_trainer):
    for path in (scene / "images").glob("*"):
        image = np.asarray(Image.open(path).convert("RGBA")).copy()
        image[:36, :, 3] = 0
        Image.fromarray(image).save(path.with_suffix(".png"))
    trainer = make_trainer(make_config(scene, steps=2))
    trainer.train()
    _, batch = trainer.pipeline.datamanager.next_train(2)
    assert batch["image"].shape[-1] == 4
    assert batch["patch_weights"][0].max() == 0 and batch["patch_weights"][-1].min() == 1


def test_views_of_different_sizes_and_orientations_train(scene, make_config, make_trainer):
    transforms = json.loads((scene / "transforms.json").read_text())
    common = {name: transforms.pop(name) for name in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    for number, frame in enumerate(transforms["frames"]):
        frame.update(common)
        if number % 2:  # a portrait crop of the photo's middle
            left = (common["w"] - 50) // 2
            path = scene / frame["file_path"]
            with Image.open(path) as image:
                cropped = image.crop((left, 0, left + 50, common["h"]))
            cropped.save(path)
            frame.update(w=50, cx=common["cx"] - left)
    (scene / "transforms.json").write_text(json.dumps(transforms))
    trainer = make_trainer(make_config(scene, steps=14))
    trainer.train()
    grids = {tuple(trainer.pipeline.datamanager.next_train(0)[1]["teacher"].shape[1:]) for _ in range(12)}
    assert len(grids) == 2
    assert np.isfinite(trainer.pipeline.get_average_eval_image_metrics()["feature_cosine"])


def test_camera_optimization_leaves_the_separation_intact(scene, make_config, make_trainer):
    config = make_config(scene, steps=6)
    config.pipeline.model.camera_optimizer.mode = "SO3xR3"
    trainer = make_trainer(config)
    pipeline = trainer.pipeline
    pipeline.train()
    pipeline.model.optimizers = trainer.optimizers.optimizers
    camera, batch = pipeline.datamanager.next_train(0)
    losses = pipeline.model.get_loss_dict(pipeline.model(camera), batch)
    losses["feature_loss"].backward()
    assert pipeline.model.camera_optimizer.pose_adjustment.grad is None
    trainer.train()
    assert pipeline.model.camera_optimizer.pose_adjustment.any()


def test_features_are_rendered_where_camera_optimization_moved_a_training_view(scene, make_config, make_trainer):
    """In training, by the camera's number; in evaluation a camera is where it says."""
    config = make_config(scene)
    config.pipeline.model.camera_optimizer.mode = "SO3xR3"
    pipeline = make_trainer(config).pipeline
    model = pipeline.model
    model.camera_optimizer.pose_adjustment.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.gauss_params["fit3d_features"].data.normal_(generator=torch.Generator().manual_seed(1))
    camera, _ = pipeline.datamanager.next_train(0)
    camera = camera.to(model.device)
    for render in (lambda camera: model.render_low(camera)[0], model.decode_view):
        with torch.no_grad():
            pipeline.train()
            trained = render(camera)
            pipeline.eval()
            moved, still = render(model.corrected(camera)), render(camera)
        torch.testing.assert_close(trained, moved, rtol=1e-5, atol=1e-5)
        assert float((trained - still).abs().max()) > 0.1


def test_training_touches_no_network_when_weights_are_local(scene, make_config, make_trainer, monkeypatch):
    import socket

    def refuse(*arguments):
        raise AssertionError(f"the network was touched: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    make_trainer(make_config(scene, steps=3)).train()


def test_mcmc_carries_feature_rows_along(scene, make_config, make_trainer, monkeypatch):
    """Nerfstudio 1.1.5 has no MCMC yet, so gsplat's own operations are applied; their one CUDA kernel is replaced."""
    from gsplat.strategy import ops

    def relocation(opacities, scales, **_):
        return opacities * 0.5, scales

    monkeypatch.setattr(ops, "compute_relocation", relocation)
    trainer = make_trainer(make_config(scene, steps=8, stop_split_at=0))
    trainer.train()
    model, optimizers = trainer.pipeline.model, trainer.optimizers.optimizers
    start = model.num_points
    for name in ("fit3d_features", "features_dc"):
        model.gauss_params[name].data[:, 1] = torch.arange(start, dtype=torch.float32)
    gaussian_optimizers = {name: optimizers[name] for name in model.gauss_params}
    dead = torch.zeros(start, dtype=torch.bool)
    dead[: start // 4] = True
    binoms = torch.ones(51, 51)
    ops.relocate(model.gauss_params, gaussian_optimizers, state={}, mask=dead, binoms=binoms)
    ops.sample_add(model.gauss_params, gaussian_optimizers, state={}, n=50, binoms=binoms)
    assert model.num_points == start + 50
    tags = model.gauss_params["fit3d_features"][:, 1]
    assert torch.equal(tags, model.gauss_params["features_dc"][:, 1])
    assert (tags[: start // 4] != torch.arange(start // 4)).all()  # dead ones took over living ones' rows
    assert optimizers["fit3d_features"].param_groups[0]["params"][0] is model.gauss_params["fit3d_features"]
