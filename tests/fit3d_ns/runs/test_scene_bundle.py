"""A bundle holds exactly what its run renders, and the pictures that its cameras describe."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

from fit3d_ns.data.photos.bundled import BundledPhoto, hash_file, locate, read_photo
from fit3d_ns.data.photos.lenses import Lens
from fit3d_ns.features.decoder import FeatureDecoder, decode_patches
from fit3d_ns.rasterization import rasterize
from fit3d_ns.runs import bundling as bundle_runs
from fit3d_ns.runs.bundle import SceneBundle, find_bundles, write_bundle
from fit3d_ns.runs.bundling import bundle_run, choose_runs
from fit3d_ns.support.errors import UserError


@pytest.fixture
def train(make_config, make_trainer):
    """Trains a short run and saves it; returns the trainer."""

    def run(scene: Path, steps: int = 3, **model_fields):
        config = make_config(scene, steps=steps, feature_init="random", **model_fields)
        trainer = make_trainer(config)
        config.save_config()
        path = config.get_base_dir() / "dataparser_transforms.json"
        trainer.pipeline.datamanager.train_dataparser_outputs.save_dataparser_transform(path)
        trainer.train()
        return trainer

    return run


def outputs_of(trainer) -> Path:
    return trainer.config.output_dir


def decode_from_bundle(bundle: SceneBundle, index: int) -> torch.Tensor:
    """A view's decoded features, from nothing but the bundle."""
    scene, cameras, info = bundle.read_scene(), bundle.read_cameras(), bundle.info
    photo, grid = info.views[index].photo, info.patch_grid(index)
    height, width = info.feature_grid.render_size((photo.height, photo.width), grid)
    intrinsics = cameras.Ks[index].clone()
    intrinsics[0] *= width / photo.width
    intrinsics[1] *= height / photo.height
    low, _, _ = rasterize(
        scene.geometry.means,
        scene.geometry.quats,
        scene.geometry.scales,
        scene.geometry.opacities,
        scene.features.float(),
        cameras.viewmats[index][None],
        intrinsics[None],
        width,
        height,
        tile_size=info.feature_grid.tile_size,
        rasterize_mode=info.feature_grid.rasterize_mode,
    )
    decoder = FeatureDecoder(scene.decoder.shape[1], scene.decoder.shape[0])
    decoder.weight.data = scene.decoder
    return decode_patches(low[0].permute(2, 0, 1), decoder.weight, info.feature_grid, grid)


@pytest.mark.parametrize("grid", ["fast", "paper"])
def test_a_bundle_renders_what_its_run_renders(scene, train, grid):
    trainer = train(scene, feature_grid=grid)
    runs, notes = choose_runs([outputs_of(trainer)])
    assert notes == [] and runs[0].name == "scene"
    bundle, reused = bundle_run(runs[0])
    assert not reused and bundle.folder == runs[0].config_path.parent / "bundle"
    model, datamanager = trainer.pipeline.model.eval(), trainer.pipeline.datamanager
    info = bundle.info
    assert info.teacher == datamanager.teacher_identity()
    assert info.feature_grid == model.feature_grid
    assert len(info.indices("train")) == len(datamanager.train_dataset)
    splits: list[Literal["train", "eval"]] = ["train", "eval"]
    for split in splits:
        dataset = getattr(datamanager, f"{split}_dataset")
        for position, index in enumerate(info.indices(split)):
            photo = info.views[index].photo
            assert Path(photo.path) == dataset.image_filenames[position]
            cached = getattr(datamanager, f"cached_{split}")[position]["image"]
            assert torch.equal(read_photo(photo), cached)
            if position in (0, 3):
                with torch.no_grad():
                    expected = model.decode_view(dataset.cameras[position : position + 1])
                    torch.testing.assert_close(decode_from_bundle(bundle, index), expected, rtol=2e-3, atol=2e-3)
    stored = json.loads((runs[0].config_path.parent / "dataparser_transforms.json").read_text())
    torch.testing.assert_close(torch.tensor(info.dataparser_transform), torch.tensor(stored["transform"]))
    assert info.dataparser_scale == pytest.approx(stored["scale"])


def test_fresh_bundles_are_reused_and_stale_ones_made_anew(scene, train):
    trainer = train(scene)
    (run,), _ = choose_runs([outputs_of(trainer)])
    first, _ = bundle_run(run)
    again, reused = bundle_run(run)
    assert reused and again.id == first.id
    run.checkpoint.touch()
    _, reused = bundle_run(run)
    assert not reused
    (first.folder / "scene.json").unlink()
    assert not bundle_run(run)[1]
    elsewhere, _ = bundle_run(run, first.folder.parent / "other")
    for name, tensor in elsewhere.read_scene().tensors().items():
        assert torch.equal(tensor, first.read_scene().tensors()[name])


def test_the_newest_finished_run_of_a_scene_is_taken(scene, train):
    old, new, unfinished = train(scene), train(scene), train(scene)
    path = unfinished.base_dir / "config.yml"
    path.write_text(path.read_text().replace("max_num_iterations: 3", "max_num_iterations: 30"))
    runs, notes = choose_runs([outputs_of(old)])
    assert [run.config_path.parent for run in runs] == [new.base_dir]
    assert any("older than another run" in note for note in notes)
    assert any("stopped after 3 of 30 steps" in note for note in notes)
    assert len(choose_runs([outputs_of(old)], all_runs=True)[0]) == 2


def test_masked_and_transparent_photos(scene, train):
    transforms = json.loads((scene / "transforms.json").read_text())
    for number, frame in enumerate(transforms["frames"]):
        path = scene / frame["file_path"]
        picture = Image.open(path).convert("RGBA")
        alpha = Image.new("L", picture.size, 255)
        if number % 2:
            alpha.paste(0, (0, 0, picture.width // 2, picture.height))
        picture.putalpha(alpha)
        picture.save(path)
    trainer = train(scene, background_color="black")
    bundle, _ = bundle_run(choose_runs([outputs_of(trainer)])[0][0])
    weights = bundle.read_patch_weights()
    assert 0 < len(weights) < len(bundle.info.views)  # only where something is left out
    datamanager = trainer.pipeline.datamanager
    for index in bundle.info.indices("train"):
        camera, batch = datamanager.train_dataset.cameras[index : index + 1], datamanager.cached_train[index].copy()
        expected = datamanager._with_teacher("train", camera, batch)["patch_weights"]
        torch.testing.assert_close(weights.get(index, torch.ones_like(expected)), expected, atol=1e-3, rtol=0)
        photo = read_photo(bundle.info.views[index].photo)
        assert photo.shape[-1] == 3
        if index in weights:
            assert int(photo[:, : photo.shape[1] // 2 - 1].max()) == 0


@pytest.mark.parametrize("model", ["OPENCV", "OPENCV_FISHEYE"])
def test_distorted_photos_come_as_the_camera_sees_them(scene, train, model):
    transforms = json.loads((scene / "transforms.json").read_text())
    transforms.update(camera_model=model, k1=0.08, k2=-0.02)
    transforms.update({"p1": 0.001, "p2": -0.001} if model == "OPENCV" else {"k3": 0.001, "k4": 0.0})
    (scene / "transforms.json").write_text(json.dumps(transforms))
    trainer = train(scene)
    bundle, _ = bundle_run(choose_runs([outputs_of(trainer)])[0][0])
    datamanager = trainer.pipeline.datamanager
    for index, cached in enumerate(datamanager.cached_train):
        photo = bundle.info.views[index].photo
        assert photo.lens is not None
        assert torch.equal(read_photo(photo), cached["image"])
        plain = replace(photo, lens=None, height=datamanager.train_dataset.get_numpy_image(index).shape[0])
        plain = replace(plain, width=datamanager.train_dataset.get_numpy_image(index).shape[1])
        assert not torch.equal(read_photo(plain), cached["image"])
    cameras = bundle.read_cameras()
    torch.testing.assert_close(cameras.Ks[0], datamanager.train_dataset.cameras[0].get_intrinsics_matrices())


def test_optimised_poses_are_kept(scene, train):
    trainer = train(scene)
    path = trainer.base_dir / "config.yml"
    checkpoint = next((trainer.base_dir / "nerfstudio_models").glob("*.ckpt"))
    path.write_text(path.read_text().replace("mode: 'off'", "mode: SO3xR3"))
    state = torch.load(checkpoint, weights_only=True)
    adjustment = torch.zeros(len(trainer.pipeline.datamanager.train_dataset), 6)
    adjustment[1] = torch.tensor([0.1, 0, 0, 0, 0.05, 0])
    state["pipeline"]["_model.camera_optimizer.pose_adjustment"] = adjustment
    torch.save(state, checkpoint)
    bundle, _ = bundle_run(choose_runs([outputs_of(trainer)])[0][0])
    viewmats = bundle.read_cameras().viewmats
    poses = trainer.pipeline.datamanager.train_dataset.cameras.camera_to_worlds
    centres = -torch.bmm(viewmats[:, :3, :3].transpose(1, 2), viewmats[:, :3, 3:])[..., 0]
    torch.testing.assert_close(centres[0], poses[0, :, 3], atol=1e-5, rtol=0)
    torch.testing.assert_close(centres[1], poses[1, :, 3] + torch.tensor([0.1, 0, 0]), atol=1e-5, rtol=0)


def test_moved_scenes_and_photos(scene, train, tmp_path):
    trainer = train(scene)
    (run,), _ = choose_runs([outputs_of(trainer)])
    bundle, _ = bundle_run(run)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(scene, elsewhere / scene.name)
    shutil.rmtree(bundle.folder)
    with pytest.raises(UserError, match="is missing: restore it, or name the folder it moved to with --data-root"):
        bundle_run(run)
    for root in (elsewhere, elsewhere / scene.name):
        moved, _ = bundle_run(run, tmp_path / f"bundle-{root.name}", root)
        assert all(Path(view.photo.path).is_file() for view in moved.info.views)
        photo = bundle.info.views[2].photo
        assert torch.equal(read_photo(photo, root), read_photo(moved.info.views[2].photo))
    with pytest.raises(UserError, match="Nothing below"):
        locate(scene / "images" / "nothing.png", elsewhere)


def test_a_scene_whose_poses_changed_is_refused(scene, train):
    trainer = train(scene)
    transforms = json.loads((scene / "transforms.json").read_text())
    transforms["frames"][0]["transform_matrix"][0][3] += 1.0
    (scene / "transforms.json").write_text(json.dumps(transforms))
    (run,), _ = choose_runs([outputs_of(trainer)])
    with pytest.raises(UserError, match="other coordinates than when"):
        bundle_run(run)


def test_damaged_files_of_a_run_are_named(scene, train):
    trainer = train(scene)
    (run,), _ = choose_runs([outputs_of(trainer)])
    path = trainer.base_dir / "dataparser_transforms.json"
    for content in (path.read_text()[:50], "[]", '{"transform": [[1]], "scale": 1}', '{"transform": null, "scale": 1}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"dataparser_transforms\.json is damaged .*restore it or train again"):
            bundle_run(run)
    text = run.config_path.read_text()
    run.config_path.unlink()
    run.config_path.mkdir()  # cannot be read, by no user
    with pytest.raises(UserError, match=r"config\.yml cannot be read \(Is a directory\): .*--runs"):
        choose_runs([outputs_of(trainer)])
    run.config_path.rmdir()
    run.config_path.write_text(re.sub(r"(?m)^    data: !!.*\n(    - .*\n)*", "    data: null\n", text))
    with pytest.raises(UserError, match=r"config\.yml names no scene"):
        choose_runs([outputs_of(trainer)])


def test_what_needs_nerfstudio_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nerfstudio", None)
    with pytest.raises(UserError, match=r"^Trained runs \(--runs\) need nerfstudio, .*pip install nerfstudio"):
        choose_runs([tmp_path])
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 6)).save(path)
    lens = Lens(1, 8.0, 8.0, 4.0, 3.0, 8, 6, (0.1, 0, 0, 0, 0, 0))
    monkeypatch.setitem(sys.modules, "nerfstudio.cameras.cameras", None)
    with pytest.raises(UserError, match=r"^Photos of a distorting lens need nerfstudio, .*pip install nerfstudio"):
        read_photo(BundledPhoto(str(path), hash_file(path), 6, 8, lens))


def test_features_that_were_never_lifted_are_refused(scene, train, tmp_path):
    trainer = train(scene)
    bundle, _ = bundle_run(choose_runs([outputs_of(trainer)])[0][0])
    stored = bundle.read_scene()
    parts = (bundle.read_cameras(), bundle.read_patch_weights())
    for change, sentence in (
        ({"features": torch.zeros_like(stored.features)}, "all zero: it was never lifted; run fit3d-lift"),
        ({"features": stored.features * float("inf")}, r"not finite, or too large for half precision \(features\)"),
        ({"geometry": replace(stored.geometry, means=stored.geometry.means * torch.nan)}, r"not finite.*\(means\)"),
        ({"geometry": stored.geometry[:0], "features": stored.features[:0]}, "has no Gaussians"),
    ):
        with pytest.raises(UserError, match=sentence):
            write_bundle(tmp_path / "bad", bundle.info, replace(stored, **change), *parts)
    assert not (tmp_path / "bad").exists()


def test_torn_and_foreign_bundles_do_not_open(scene, train, tmp_path):
    trainer = train(scene)
    bundle, _ = bundle_run(choose_runs([outputs_of(trainer)])[0][0])
    assert find_bundles([outputs_of(trainer)]) == [bundle.folder]
    for name, break_it, sentence in (
        ("tensors", lambda folder: (folder / "scene.safetensors").unlink(), "scene.safetensors is missing"),
        ("json", lambda folder: (folder / "scene.json").write_text("{"), "is damaged"),
        ("schema", lambda folder: _edit(folder, schema=99), "has the schema 99"),
        ("id", lambda folder: _edit(folder, id="other"), "hash differs from its id"),
        ("old", lambda folder: _edit(folder, schema=1, id="other"), "do not belong together"),
        ("entry", lambda folder: _edit(folder, schema=1, info={}), "info.scene is missing"),
    ):
        copy = Path(shutil.copytree(bundle.folder, tmp_path / name))
        break_it(copy)
        with pytest.raises(UserError, match=sentence):
            SceneBundle(copy)
    with pytest.raises(UserError, match="is no scene bundle"):
        SceneBundle(tmp_path)


def test_a_run_without_features_is_named(scene, train):
    trainer = train(scene)
    checkpoint = next((trainer.base_dir / "nerfstudio_models").glob("*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)
    del state["pipeline"]["_model.gauss_params.fit3d_features"]
    torch.save(state, checkpoint)
    (run,), _ = choose_runs([outputs_of(trainer)])
    with pytest.raises(UserError, match="holds no fit3d_features"):
        bundle_run(run)
    assert not (run.config_path.parent / bundle_runs.BUNDLE_FOLDER).exists()


def _edit(folder: Path, **changes) -> None:
    path = folder / "scene.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
