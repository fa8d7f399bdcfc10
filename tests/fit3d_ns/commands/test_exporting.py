"""``fit3d-export`` on a run of the tiny room, read back with the tools that its files are for."""

import json
import re
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open3d as o3d
import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.scripts.exporter import ExportGaussianSplat
from nerfstudio.utils.eval_utils import eval_setup
from paths import ROOT
from plyfile import PlyData
from scipy.spatial.transform import Rotation

from fit3d_ns.commands.export.camera_path import path_along_views
from fit3d_ns.commands.export.cli import ExportCommand, run_export
from fit3d_ns.commands.export.trained_run import open_run
from fit3d_ns.commands.export.turntable import render_pair
from fit3d_ns.commands.lift.cli import LiftCommand, run_lift
from fit3d_ns.data.points.splat_ply import SH_C0, read_ply
from fit3d_ns.runs.bundle import SceneBundle
from fit3d_ns.runs.checkpoints import find_checkpoint, read_checkpoint
from fit3d_ns.support.errors import UserError

av = pytest.importorskip("av", reason="av is not installed")

STEPS = 12
NOTHING = {"splat": False, "pca_splat": False, "point_cloud": False, "bundle": False, "video": False}
CHEAP = {"video": False, "bundle": False}
ROTTEN = (3, 11)
FAINT = 7


@pytest.fixture
def make_run(scene, make_config, make_trainer):
    """Trains a short run; returns its config.yml."""

    def make(**fields) -> Path:
        config = make_config(scene, steps=STEPS, **fields)
        config.pipeline.datamanager.dataparser = NerfstudioDataParserConfig(
            load_3D_points=True, eval_mode="interval", eval_interval=4
        )
        stored = deepcopy(config)
        trainer = make_trainer(config)
        trainer.train()
        stored.experiment_name = config.experiment_name
        stored.save_config()
        return config.get_base_dir() / "config.yml"

    return make


def change_checkpoint(run, change):
    path = find_checkpoint(run)
    state = torch.load(path, weights_only=True)
    change(state["pipeline"])
    torch.save(state, path)


def spoil(pipeline):
    """Gaussians as optimization may leave them: two that are not finite, one that is too faint to be rendered."""
    pipeline["_model.gauss_params.scales"][ROTTEN[0], 1] = torch.nan
    pipeline["_model.gauss_params.features_rest"][ROTTEN[1], 0, 0] = torch.inf
    pipeline["_model.gauss_params.opacities"][FAINT] = -6


def columns(path):
    vertices = PlyData.read(path)["vertex"]
    return {item.name: np.asarray(vertices[item.name]) for item in vertices.properties}


def block(table, *names):
    return torch.from_numpy(np.stack([table[name] for name in names], axis=1))


def parameter(run, name):
    return read_checkpoint(find_checkpoint(run))["pipeline"][f"_model.gauss_params.{name}"]


def export(run, folder, **fields: Any):
    return run_export(ExportCommand(run, folder, **fields))


def refused(pattern, **fields: Any):
    with pytest.raises(UserError, match=pattern) as caught:
        run_export(ExportCommand(**fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sh_degree", [0, 2])
def test_splat_is_what_ns_export_writes_and_has_the_features(make_run, tmp_path, sh_degree):
    run = make_run(sh_degree=sh_degree)
    if sh_degree:
        change_checkpoint(run, spoil)
    written = export(run, tmp_path / "ours", **CHEAP)
    assert [path.name for path in written] == [
        "splat.ply",
        "splat_pca.ply",
        "points.ply",
        "points_pca.ply",
        "export.json",
    ]
    ExportGaussianSplat(load_config=run, output_dir=tmp_path / "theirs").main()
    theirs, ours = columns(tmp_path / "theirs" / "splat.ply"), columns(tmp_path / "ours" / "splat.ply")
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, column in theirs.items():
        assert np.array_equal(ours[name], column), name
    features = parameter(run, "fit3d_features")
    kept = torch.ones(len(features), dtype=torch.bool)
    if sh_degree:
        kept[[*ROTTEN, FAINT]] = False
    names = [name for name in ours if name not in theirs]
    assert names == [f"feat_{number}" for number in range(8)]
    assert torch.equal(block(ours, *names), features[kept])
    assert features[kept].any()
    assert json.loads((tmp_path / "ours" / "export.json").read_text())["gaussians"] == int(kept.sum())


@pytest.mark.parametrize("sh_degree", [0, 1])
def test_lifting_onto_the_exported_splat_gives_the_same_gaussians(make_run, scene, tmp_path, sh_degree):
    run = make_run(sh_degree=sh_degree)
    export(run, tmp_path / "out", **CHEAP)
    datamanager = open_run(run).config.pipeline.datamanager
    (lifted,) = run_lift(
        LiftCommand(
            ply=tmp_path / "out" / "splat.ply",
            data=scene,
            output_dir=tmp_path / "lifted",
            backbone=datamanager.backbone,
            backbone_weights=datamanager.backbone_weights,
            feature_dim=8,
        )
    )
    for name in ("means", "scales", "quats", "opacities", "features_dc", "features_rest"):
        before, after = parameter(run, name), parameter(lifted, name)
        if sh_degree == 0 and name == "features_dc":  # through a sigmoid and back
            torch.testing.assert_close(after.sigmoid(), before.sigmoid(), atol=1e-5, rtol=0)
        else:
            assert torch.equal(after, before), name


def test_other_programs_see_the_features_colours(make_run, tmp_path):
    run = make_run(sh_degree=1)
    change_checkpoint(run, spoil)
    export(run, tmp_path, **CHEAP)
    splat, pca = columns(tmp_path / "splat.ply"), columns(tmp_path / "splat_pca.ply")
    note = json.loads((tmp_path / "export.json").read_text())
    # 62 floats in the order of 3DGS's own writer, geometry as in the other file.
    assert len(pca) == 62 and list(pca)[9:54] == [f"f_rest_{number}" for number in range(45)]
    for name in ("x", "y", "z", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"):
        assert np.array_equal(pca[name], splat[name]), name
    assert not block(pca, *list(pca)[9:54]).any()
    shown = block(pca, "f_dc_0", "f_dc_1", "f_dc_2") * SH_C0 + 0.5
    matrix, offset = torch.tensor(note["pca"]["matrix"]), torch.tensor(note["pca"]["offset"])
    features = block(splat, *[f"feat_{number}" for number in range(8)])
    seen = features.any(1)
    torch.testing.assert_close(shown[seen], (features @ matrix.T + offset).clamp(0, 1)[seen], atol=1e-4, rtol=0)
    assert shown[seen].std(0).min() > 0.05
    # The reader that lifting uses takes it too.
    assert read_ply(tmp_path / "splat_pca.ply")["features_rest"].shape[1:] == (15, 3)

    for name, expected in (("points_pca.ply", shown), ("points.ply", block(splat, "f_dc_0", "f_dc_1", "f_dc_2"))):
        rgb = expected if name == "points_pca.ply" else (expected * SH_C0 + 0.5).clamp(0, 1)
        cloud = o3d.io.read_point_cloud(str(tmp_path / name))
        assert np.allclose(np.asarray(cloud.points), block(splat, "x", "y", "z"))
        assert np.allclose(np.asarray(cloud.colors), rgb, atol=1 / 255)
        normals = np.asarray(cloud.normals)
        assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
        tensors = o3d.t.io.read_point_cloud(str(tmp_path / name))
        opacities = torch.from_numpy(tensors.point["opacity"].numpy())[:, 0]
        torch.testing.assert_close(opacities, torch.from_numpy(splat["opacity"]).sigmoid())
    # Along its normal, a Gaussian is as thick as its smallest scale.
    gaussians = read_ply(tmp_path / "splat.ply")
    axes = torch.from_numpy(normals).float()
    along = torch.einsum("ni,nij,nj->n", axes, covariance(gaussians["quats"], gaussians["scales"]), axes)
    torch.testing.assert_close(along, gaussians["scales"].exp().min(1).values ** 2, atol=1e-7, rtol=1e-3)


def covariance(quats, scales):
    rotations = torch.from_numpy(Rotation.from_quat(quats.numpy()[:, [1, 2, 3, 0]]).as_matrix()).float()
    axes = rotations * scales.exp()[:, None, :]
    return axes @ axes.transpose(1, 2)


def test_bundle_feature_maps_and_video_along_a_path(make_run, tmp_path):
    run = make_run(sh_degree=1)
    export(run, tmp_path, camera_path="eval", feature_maps=True, fps=10)
    trained = open_run(run)
    model = trained.build_model(torch.device("cpu"))

    bundle = SceneBundle(tmp_path / "bundle")
    assert torch.equal(bundle.read_scene().features, trained.features.half())
    rows = bundle.info.indices("eval")
    cameras = bundle.read_cameras()

    paths = sorted((tmp_path / "feature_maps").iterdir())
    assert [path.name for path in paths] == [f"{number:05d}.npz" for number in range(len(rows))]
    pipeline: Any = eval_setup(run, test_mode="val")[1]
    # The maps are those of the run as ns-eval opens it.
    for path, row, (camera, batch) in zip(paths, rows, pipeline.datamanager.fixed_indices_eval_dataloader):
        stored = np.load(path)
        assert stored["name"] == bundle.info.views[row].name
        assert tuple(stored["image_size"]) == (72, 96)
        assert np.allclose(stored["viewmat"], cameras.viewmats[row], atol=1e-6)
        assert np.allclose(stored["K"], cameras.Ks[row])
        with torch.no_grad():
            expected = pipeline.model.decode_view(camera)
        assert stored["features"].shape == batch["teacher"].shape and stored["features"].dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(stored["features"]).float(), expected, atol=2e-3, rtol=2e-3)
        assert stored["accumulation"].shape == expected.shape[1:]
        assert 0.3 < stored["accumulation"].max() <= 1

    with av.open(str(tmp_path / "feature_pca.mp4")) as video:
        assert video.streams.video[0].average_rate == 10
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) / 255 for frame in video.decode(video=0)]
    assert len(frames) == len(rows) and frames[0].shape == (72, 192, 3)
    path = path_along_views(bundle.info.views, cameras, "eval")
    for index, frame in enumerate(frames):
        expected = render_pair(model, trained.colors, path, index, (72, 96))
        with torch.no_grad():
            rgb = model.get_outputs_for_camera(path.camera(index, "cpu"))["rgb"]
        torch.testing.assert_close(expected[:, :96], rgb, atol=1e-5, rtol=0)
        assert (frame - expected).abs().mean() < 0.03  # H.264 loses some
        assert expected[:, 96:].std((0, 1)).min() > 0.02


def test_the_examples_of_the_documentation(make_run, scene, tmp_path, monkeypatch):
    run = make_run(sh_degree=1)
    export(run, tmp_path / "out", camera_path="eval", feature_maps=True)
    monkeypatch.chdir(tmp_path / "out")
    text = (ROOT / "docs" / "export.md").read_text()
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    pca = columns(tmp_path / "out" / "points_pca.ply")
    assert np.allclose(names["colors"], np.stack([pca["red"], pca["green"], pca["blue"]], 1) / 255, atol=1 / 255)
    assert names["patch"].shape == (64,) and names["patch"].any()
    # In the scene's own coordinates, Gaussians surround the cameras of its transforms.json.
    poses = json.loads((scene / "transforms.json").read_text())
    eyes = np.array([frame["transform_matrix"] for frame in poses["frames"]])[:, :3, 3]
    low, high = np.quantile(names["in_scene"], [0.02, 0.98], axis=0)
    assert bool(((eyes > low) & (eyes < high)).all())


def test_orbit_and_a_path_of_the_viewer(make_run, tmp_path):
    run = make_run(sh_degree=0)
    path = {
        "camera_type": "perspective",
        "render_height": 61,
        "render_width": 90,
        "seconds": 0.5,
        "camera_path": [
            {"camera_to_world": np.eye(4).ravel().tolist(), "fov": 60, "aspect": 1.5},
            {"camera_to_world": np.diag([-1.0, 1, -1, 1]).ravel().tolist(), "fov": 60, "aspect": 1.5},
        ],
    }
    (tmp_path / "camera_path.json").write_text(json.dumps(path))
    only_video = {**NOTHING, "video": True}
    export(run, tmp_path / "path", camera_path=str(tmp_path / "camera_path.json"), **only_video)
    with av.open(str(tmp_path / "path" / "feature_pca.mp4")) as video:
        assert video.streams.video[0].average_rate == 4
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(60, 180, 3)] * 2  # without the odd row
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 5

    export(run, tmp_path / "orbit", frames=5, video_size=48, **only_video)
    with av.open(str(tmp_path / "orbit" / "feature_pca.mp4")) as video:
        assert [frame.to_ndarray().shape for frame in video.decode(video=0)]  # decodes
        assert video.streams.video[0].frames == 5
        assert (video.streams.video[0].height, video.streams.video[0].width) == (36, 96)
    assert sorted(path.name for path in (tmp_path / "orbit").iterdir()) == ["export.json", "feature_pca.mp4"]


# --- Bad input: one sentence each ---


def test_runs_and_folders_that_cannot_be_used(make_run, scene, tmp_path, monkeypatch):
    run = make_run(sh_degree=1)
    out = tmp_path / "out"
    export(run, out, **CHEAP)
    before = (out / "splat.ply").read_bytes()
    refused("splat.ply exists already: add --overwrite", load_config=run, output_dir=out, **CHEAP)
    change_checkpoint(run, lambda pipeline: pipeline["_model.gauss_params.means"].add_(1))
    export(run, out, overwrite=True, **CHEAP)
    assert (out / "splat.ply").read_bytes() != before

    # Other files of the same run may join them, those of another run may not.
    export(run, out, camera_path="eval", **{**NOTHING, "video": True})
    other = Path(shutil.copytree(run.parent, run.parent.with_name("other"))) / "config.yml"
    refused(
        "out holds exports of .*: choose another --output-dir",
        load_config=other,
        output_dir=out,
        **{**NOTHING, "bundle": True},
    )

    refused("Nothing is left to export", load_config=run, output_dir=out, **NOTHING)
    refused("--frames 0 is out of range", load_config=run, output_dir=tmp_path / "x", frames=0)
    refused("--output-dir .* is a file", load_config=run, output_dir=out / "splat.ply")
    refused("cannot be read", load_config=tmp_path / "nowhere.yml", output_dir=tmp_path / "x")
    refused("camera path .* cannot be read", load_config=run, output_dir=tmp_path / "x", camera_path="circle")
    (tmp_path / "path.json").write_text('{"camera_path": []}')
    refused("no camera path", load_config=run, output_dir=tmp_path / "x", camera_path=str(tmp_path / "path.json"))
    (tmp_path / "path.json").write_text('{"camera_type": "fisheye"}')
    refused("are fisheye", load_config=run, output_dir=tmp_path / "x", camera_path=str(tmp_path / "path.json"))

    with monkeypatch.context() as patched:
        for module in ("av", "av.codec"):
            patched.setitem(sys.modules, module, None)
        refused("Videos need FFmpeg.*--no-video", load_config=run, output_dir=tmp_path / "x")
        export(run, tmp_path / "no_ffmpeg", **CHEAP)
    assert not (tmp_path / "x").exists()

    # Without its photos a run still gives what needs none of them.
    moved = Path(shutil.move(scene, tmp_path / "moved_scene"))
    refused("is missing: .*--data-root", load_config=run, output_dir=tmp_path / "y")
    assert not (tmp_path / "y").exists()
    export(run, tmp_path / "y", **CHEAP)
    export(run, tmp_path / "z", data_root=moved, frames=1)
    assert SceneBundle(tmp_path / "z" / "bundle").info.views

    text = run.read_text()
    run.write_text(text.replace("method_name: fit3d-splat", "method_name: splatfacto"))
    refused("run of splatfacto, not of fit3d-splat", load_config=run, output_dir=tmp_path / "x")
    run.write_text(text)
    change_checkpoint(run, lambda pipeline: pipeline["_model.gauss_params.fit3d_features"][5].fill_(torch.nan))
    refused("NaN or infinite", load_config=run, output_dir=tmp_path / "x")
    change_checkpoint(run, lambda pipeline: pipeline["_model.gauss_params.fit3d_features"].zero_())
    refused("are all zero, nothing was lifted", load_config=run, output_dir=tmp_path / "x")
    change_checkpoint(run, lambda pipeline: pipeline["_model.gauss_params.opacities"].fill_(-9))
    refused("no visible Gaussian", load_config=run, output_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "content", [b'{"transform": [[1, 0', b"null", b"[]", b'{"transform": null, "scale": null}', b"\xff"]
)
def test_an_export_comes_whole_or_not_at_all(make_run, tmp_path, content):
    """Whatever is found wrong last, such as the coordinates that the index is to tell."""
    run = make_run(feature_init="random")
    export(run, tmp_path / "out", **CHEAP)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (run.parent / "dataparser_transforms.json").write_bytes(content)
    for folder, left in ((tmp_path / "out", before), (tmp_path / "new", {})):
        with pytest.raises(UserError, match="dataparser_transforms.json is damaged"):
            export(run, folder, overwrite=True, **CHEAP)
        assert {path.name: path.read_bytes() for path in folder.glob("*")} == left
