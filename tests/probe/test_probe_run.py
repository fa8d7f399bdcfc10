"""The command from files to report: rows, resuming, determinism, several processes, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import TINY_ROOM
from PIL import Image
from probe_files import TINY, probe_in_two_processes, save_png

from fit3d_ns.support.errors import UserError
from probe import run as run_module
from probe.cli import main
from probe.config import DepthConfig, SegmentationConfig
from probe.data.choice import Kind
from probe.protocols import choose_recipe
from probe.run import run_trained_probe


@pytest.fixture
def make_config(tiny_config):
    """Builds a short probe of the tiny backbone; small crops, so that the full protocol takes a second."""

    def make(output: str, kind=SegmentationConfig, **options):
        short = {"protocol": "paper", "iterations": 6, "batch_size": 4, "learning_rates": (1e-2,)}
        return tiny_config(output, kind, **{**short, **options})

    return make


@pytest.fixture(autouse=True)
def small_recipes(monkeypatch):
    """The full segmentation recipe at an eighth of its size."""
    from dataclasses import replace

    choose = run_module.choose_recipe

    def small(kind, dataset):
        recipe = choose(kind, dataset)
        if kind == "segmentation":
            return replace(recipe, short_side=64, long_side=256, crop=64, window=64, stride=42)
        return recipe

    monkeypatch.setattr(run_module, "choose_recipe", small)


def _rows(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["rows"]


def test_fast_segmentation_learns_and_reports(make_config, weights, tmp_path):
    config = make_config(
        "fast", protocol="fast", iterations=60, learning_rates=(1e-3, 3e-2), seeds=(0, 1), control=(weights["control"],)
    )
    run_trained_probe(config, "segmentation")
    folder = tmp_path / "fast"
    rows = _rows(folder)
    assert list(rows) == ["original", "duplicate", "tuned", "add", "linear", "concat"] + [
        "control", "control_add", "control_linear", "control_concat",
    ]  # fmt: skip
    assert rows["original"]["miou"]["mean"] > 0.6 and rows["concat"]["channels"] == 128
    assert len(rows["concat"]["miou"]["values"]) == 2 and rows["concat"]["miou"]["spread"] is not None
    assert set(rows["original"]["validation"][0]) == {"0.001", "0.03"}
    assert rows["original"]["learning_rates"] == [0.03, 0.03]
    table = (folder / "table.md").read_text()
    assert "FAST" in table and "±" in table and "| duplicate | 128 |" in table and "held out of training" in table
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 3 * 5 and "class 2" in page and "torch" in page and "by mIoU on held-out" in page
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["versions"]["timm"] and numbers["command"] and numbers["facts"]["labels_seen"] == 3
    for seed in (0, 1):
        lines = (folder / "curves" / f"seed_{seed}" / "curves.jsonl").read_text().splitlines()
        assert lines and all(json.loads(line)["step"] > 0 for line in lines)


def test_full_segmentation_resumes_to_the_same_result(make_config, tmp_path, monkeypatch):
    rows = ("original", "linear")
    run_trained_probe(make_config("whole", assemblies=rows, checkpoint_every=2), "segmentation")
    interrupted = make_config("parts", assemblies=rows, checkpoint_every=2)
    step = run_module.HeadTrainer.step

    def fail(self, number, *args):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, *args)

    monkeypatch.setattr(run_module.HeadTrainer, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        run_trained_probe(interrupted, "segmentation")
    taken = []

    def count(self, number, *args):
        taken.append(number)
        return step(self, number, *args)

    monkeypatch.setattr(run_module.HeadTrainer, "step", count)
    run_trained_probe(interrupted, "segmentation")
    assert taken == [4, 5]
    states = [torch.load(tmp_path / name / "checkpoints/seed_0.pt", weights_only=True) for name in ("whole", "parts")]
    for head, state in states[0]["heads"].items():
        for name, value in state.items():
            assert torch.equal(value, states[1]["heads"][head][name]), (head, name)
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "parts")
    taken.clear()
    run_trained_probe(interrupted, "segmentation")
    assert not taken, "a finished probe is not trained again"
    with pytest.raises(UserError, match=r"parts holds the results of another probe.*iterations.*--output-dir"):
        run_trained_probe(make_config("parts", assemblies=rows, iterations=7), "segmentation")
    labels = interrupted.data / "trainannot" / "photo_0.png"
    values = np.asarray(Image.open(labels)).copy()
    values[:9] = 255
    save_png(labels, values)
    with pytest.raises(UserError, match=r"parts holds the results of another probe.*data.files.*--output-dir"):
        run_trained_probe(interrupted, "segmentation")


@pytest.mark.parametrize("protocol", ["paper", "fast"])
def test_depth_runs_both_protocols(make_config, tmp_path, protocol):
    config = make_config(
        "depth",
        DepthConfig,
        protocol=protocol,
        iterations=160,
        learning_rates=(3e-2,),
        assemblies=("concat",),
        vis="tensorboard",
    )
    run_trained_probe(config, "depth")
    scores = _rows(tmp_path / "depth")["concat"]
    # Depths are 1, 2 and 3 m by colour; a constant guess is off by .8 m.
    assert scores["rmse"]["mean"] < 0.7 and scores["d3"]["mean"] > 0.5
    assert list((tmp_path / "depth" / "curves" / "seed_0" / "tensorboard").glob("events*"))


def test_a_shared_cache_knows_how_the_truth_was_read(make_config, tmp_path):
    """Features and truth lie in one store; the same files at another scale of depth are another truth."""
    options = {"protocol": "fast", "iterations": 3, "assemblies": ("original",), "cache_dir": tmp_path / "cache"}
    run_trained_probe(make_config("metres", DepthConfig, **options), "depth")
    run_trained_probe(make_config("halves", DepthConfig, depth_scale=2000.0, **options), "depth")
    options.pop("cache_dir")
    run_trained_probe(make_config("alone", DepthConfig, depth_scale=2000.0, **options), "depth")
    assert _rows(tmp_path / "halves") == _rows(tmp_path / "alone")


def test_the_test_split_chooses_nothing(make_config, tmp_path):
    """With labels of the test split turned around, scores change, and neither heads nor learning rates do."""
    options = {"protocol": "fast", "iterations": 20, "learning_rates": (1e-4, 1e-3, 3e-2), "assemblies": ("original",)}
    config = make_config("right", **options)
    run_trained_probe(config, "segmentation")
    for path in (config.data / "testannot").iterdir():
        labels = np.array(Image.open(path))
        save_png(path, np.where(labels == 255, 255, (labels + 1) % 3).astype(np.uint8))
    run_trained_probe(make_config("turned", **options), "segmentation")
    right, turned = (_rows(tmp_path / name)["original"] for name in ("right", "turned"))
    assert right["learning_rates"] == turned["learning_rates"] and right["validation"] == turned["validation"]
    assert right["miou"]["mean"] > turned["miou"]["mean"] + 0.1
    states = [torch.load(tmp_path / name / "checkpoints/seed_0.pt", weights_only=True) for name in ("right", "turned")]
    for head, state in states[0]["heads"].items():
        assert all(torch.equal(value, states[1]["heads"][head][name]) for name, value in state.items())


@pytest.mark.parametrize("protocol,iterations", [("fast", 20), ("paper", 3)])
def test_two_processes_equal_one(make_config, weights, tmp_path, monkeypatch, protocol, iterations):
    """Batch norm, gradients and metrics over two processes; three test photos, so one process has one less."""
    monkeypatch.setattr(run_module, "choose_recipe", choose_recipe)
    config = make_config(
        "one", assemblies=("original", "linear"), protocol=protocol, iterations=iterations, batch_size=4
    )
    run_trained_probe(config, "segmentation")
    arguments = ["segmentation", "--data", config.data, "--backbone", TINY, "--backbone-weights", weights["original"]]
    arguments += ["--tuned", weights["tuned"], "--output-dir", tmp_path / "two", "--protocol", protocol]
    arguments += ["--assemblies", "original", "linear", "--iterations", iterations, "--batch-size", 4]
    probe_in_two_processes([*arguments, "--learning-rates", 0.01])
    said = json.loads((tmp_path / "two" / "metrics.json").read_text())["command"]
    assert said.startswith("torchrun --nproc-per-node 2 -m probe.cli segmentation")
    one, two = _rows(tmp_path / "one"), _rows(tmp_path / "two")
    for name in one:
        for metric in ("miou", "macc", "aacc"):
            assert two[name][metric]["mean"] == pytest.approx(one[name][metric]["mean"], abs=2e-3), (name, metric)
    states = [torch.load(tmp_path / name / "checkpoints/seed_0.pt", weights_only=True) for name in ("one", "two")]
    for head, state in states[0]["heads"].items():
        for name, value in state.items():
            torch.testing.assert_close(states[1]["heads"][head][name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision,tolerance", [("fp32", 0.02), ("bf16", 0.1)])
def test_cuda_equals_cpu(make_config, tmp_path, precision, tolerance):
    kinds: tuple[tuple[Kind, type, str], ...] = (
        ("segmentation", SegmentationConfig, "miou"),
        ("depth", DepthConfig, "rmse"),
    )
    for kind, config_type, metric in kinds:
        found = []
        for device in ("cpu", "cuda"):
            config = make_config(f"{kind}_{device}", config_type, device=device, precision=precision, iterations=40)
            run_trained_probe(config, kind)
            found.append({row: values[metric]["mean"] for row, values in _rows(config.output_dir).items()})
        assert len(found[0]) == 6 and found[1] == pytest.approx(found[0], abs=tolerance)


def test_mistakes_are_said_in_one_sentence(make_config, weights, colored_blocks, tmp_path, capsys):
    from safetensors.torch import save_file

    def fails(match, kind: Kind = "segmentation", **options):
        with pytest.raises(UserError, match=match) as error:
            run_trained_probe(make_config("bad", **options), kind)
        assert "--pipeline" not in str(error.value) and "\n" not in str(error.value)

    other = tmp_path / "wide.safetensors"
    import timm

    save_file(timm.create_model("test_vit2", num_classes=0).state_dict(), other)
    fails(r"wide.safetensors holds weights of another architecture than test_vit.*--tuned", tuned=(other,))
    fails(r"There is no weight file .*nope.pth: check --tuned", tuned=(tmp_path / "nope.pth",))
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(r"empty holds 0 .safetensors files: name one with --tuned", tuned=(empty,))
    fails(r"http://.* is no https address", tuned=("http://example.org/tuned.pth",))
    fails(r"no fine-tuned backbone was published under that name: check --tuned", tuned=("dinov2_small",))
    for name in ("backbone_fp16", "backbone"):
        (empty / f"{name}.safetensors").write_bytes(weights["tuned"].read_bytes())
    (empty / "card.json").write_text("{}")
    fails(r"card.json is damaged, or fit3d-distill did not write it", tuned=(empty,))
    fails("There is no folder", data=tmp_path / "nothing")
    fails("--learning-rates", learning_rates=(0.0,))
    fails("--seeds", seeds=(1, 1))
    fails("--assemblies names a row twice", assemblies=("concat", "concat"))
    fails("--device mps is not supported", device="mps")
    odd = colored_blocks("odd")
    for folder in ("train", "traindepth"):
        path = odd / folder / "photo_2.png"
        Image.open(path).resize((80, 60), Image.Resampling.NEAREST).save(path)
    fails(r"photo_0.png gives training crops of 54x41 pixels and .*photo_2.png of 68x52", "depth", data=odd)
    fails("--layer 99", layer=99)
    fails("neither fit3d-ns nor timm", backbone="test_vitt")
    fails("folder has no normals probe", kind="normals")
    if not torch.cuda.is_available():
        fails("finds no CUDA device", device="cuda")
    assert not (tmp_path / "bad" / "metrics.json").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["segmentation", "--data", str(tmp_path / "nothing")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: There is no folder")


def test_published_checkpoint_layouts_load(make_config, weights, tmp_path):
    """FiT3D's files are plain timm state dicts in .pth; its trainer wraps them with optimizer and epoch."""
    from safetensors.torch import load_file

    state = load_file(weights["tuned"])
    torch.save(state, tmp_path / "dinov2_small_finetuned.pth")
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    results = []
    for name in ("dinov2_small_finetuned.pth", "checkpoint.pth"):
        config = make_config(name[:4], tuned=(tmp_path / name,), assemblies=("tuned",), protocol="fast", iterations=3)
        run_trained_probe(config, "segmentation")
        results.append(_rows(tmp_path / name[:4])["tuned"]["miou"]["mean"])
    assert results[0] == results[1]


def test_normals_are_probed_on_a_room(weights, tmp_path):
    room = TINY_ROOM
    arguments = f"normals --dataset rooms --data {room} --backbone {TINY} --backbone-weights {weights['original']}"
    arguments += (
        f" --tuned {weights['tuned']} --protocol fast --iterations 4 --workers 0 --device cpu --output-dir {tmp_path}"
    )
    main(arguments.split())
    rows = _rows(tmp_path)
    assert {"original", "duplicate", "tuned", "concat"} <= set(rows)
    assert 0 < rows["concat"]["mean_angle"]["mean"] < 180
