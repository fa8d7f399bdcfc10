"""The exact protocol from files to report: what it finds, resumes and refuses, and what a card decides."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from paths import TINY_ROOM
from PIL import Image
from probe_files import TINY, probe_in_two_processes, save_png
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fit3d_ns.backbones import BackboneSpec, backbone_identity, hash_state_dict, load
from fit3d_ns.support.errors import UserError
from probe import output_folder
from probe.cli import main
from probe.config import DepthConfig, SegmentationConfig
from probe.exact import patches, report
from probe.exact import run as exact_run
from probe.features.store import FeatureStore
from probe.run import run_trained_probe


@pytest.fixture
def make_config(tiny_config):
    """Builds an exact probe of the tiny backbone on colored blocks, whose patches hold one class each."""
    return tiny_config


@pytest.fixture
def make_result(weights, tmp_path):
    """Makes the folder of a student with a card."""

    def make(name: str, layer: int | None = None, norm: bool = True, normalization="imagenet", original="original"):
        folder = tmp_path / name
        folder.mkdir()
        state = load_file(weights["tuned"])
        save_file(state, folder / "backbone.safetensors")
        student = backbone_identity(BackboneSpec(TINY, weights[original], layer, norm, normalization))  # type: ignore[arg-type]
        (folder / "card.json").write_text(json.dumps({"student": student, "weights_sha256": hash_state_dict(state)}))
        return str(folder)

    return make


def _metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def _maps(folder: Path) -> dict[str, torch.Tensor]:
    paths = [path for path in (folder / "rows").iterdir() if ".sums." not in path.name]
    return {path.name: load_file(path)["weight"] for path in paths}


def test_students_and_controls_share_a_table(make_config, weights, tmp_path):
    config = make_config(
        "out",
        tuned=(str(weights["tuned"]), str(weights["control"])),
        control=(f"blurred={tmp_path / 'other.safetensors'}",),
    )
    (tmp_path / "other.safetensors").write_bytes(weights["original"].read_bytes())
    run_trained_probe(config, "segmentation")
    found, folder = _metrics(tmp_path / "out"), tmp_path / "out"
    rows = found["rows"]
    assert list(rows) == ["original", "duplicate", "tuned", "add", "concat", "blurred", "blurred_add", "blurred_concat"]
    assert rows["original"]["miou"]["mean"] > 0.6 and rows["concat"]["channels"] == 128
    assert rows["tuned"]["students"] == ["tuned", "tuned.2"] and rows["blurred"]["students"] == ["blurred"]
    values = rows["tuned"]["miou"]["values"]
    assert rows["tuned"]["miou"]["mean"] == pytest.approx(np.mean(values))
    assert rows["tuned"]["miou"]["spread"] == pytest.approx(np.std(values, ddof=1)) and values[0] != values[1]
    assert rows["tuned"]["miou"]["low"] <= rows["tuned"]["miou"]["mean"] <= rows["tuned"]["miou"]["high"]
    # The control is the original under another name: every number is the same.
    assert rows["blurred"]["miou"]["values"] == pytest.approx(rows["original"]["miou"]["values"], abs=1e-9)
    differences = {(one["row"], one["baseline"]): one for one in found["differences"]}
    assert set(differences) == {
        (row, "original") for row in rows if row not in ("original", "duplicate")
    } | {("tuned", "blurred"), ("add", "blurred_add"), ("concat", "blurred_concat")}  # fmt: skip
    same = differences["blurred", "original"]
    assert same["value"] == same["low"] == same["high"] == 0
    one = differences["tuned", "original"]
    assert one["value"] == pytest.approx(rows["tuned"]["miou"]["mean"] - rows["original"]["miou"]["mean"])
    assert one["low"] <= one["value"] <= one["high"] and one["low"] < one["high"]
    assert abs(found["convergence"]["miou"]) < 1e-3
    table, page = (folder / "table.md").read_text(), (folder / "report.html").read_text()
    assert "segmentation-exact-v2" in table and "Convergence: duplicate - original" in table and "±" in table
    assert "no card says otherwise" in table and "| tuned | original |" in table
    assert page.count("<img") == 3 * 5 and "held-out training photos" in page and "class 2" in page


def test_depth_is_found_and_duplicate_is_original(make_config, tmp_path):
    run_trained_probe(make_config("depth", DepthConfig), "depth")
    rows = _metrics(tmp_path / "depth")["rows"]
    # Depths are 1, 2 and 3 m by colour; a constant guess is off by .8 m.
    for row in ("original", "tuned", "concat"):
        assert rows[row]["rmse"]["mean"] < 0.45 and rows[row]["d1"]["mean"] > 0.6, row
    assert rows["duplicate"]["rmse"]["mean"] == pytest.approx(rows["original"]["rmse"]["mean"], abs=1e-4)


def test_normals_are_better_than_the_best_constant_guess(weights, tmp_path):
    arguments = f"normals --dataset rooms --data {TINY_ROOM} --backbone {TINY} --backbone-weights {weights['original']}"
    main([*arguments.split(), "--workers", "0", "--device", "cpu", "--output-dir", str(tmp_path / "out")])
    from probe.data.choice import DataChoice
    from probe.data.loading import load_data
    from probe.tasks import TASKS

    task = TASKS["normals"](load_data(DataChoice("rooms", TINY_ROOM, "normals")), None)
    truth = np.concatenate([task.read(sample)[1].reshape(-1, 3) for sample in task.data.test])
    truth = truth[np.square(truth).sum(-1) > 0.25]
    mean = truth.mean(0)
    constant = np.rad2deg(np.arccos(np.clip(truth @ (mean / np.linalg.norm(mean)), -1, 1))).mean()
    found = _metrics(tmp_path / "out")["rows"]["original"]["mean_angle"]["mean"]
    assert found < 0.9 * constant, (found, constant)


def test_a_killed_run_goes_on_where_it_was(make_config, tmp_path, monkeypatch):
    run_trained_probe(make_config("whole"), "segmentation")
    solved, solve, read_truth = [], exact_run._solve, exact_run._read_truth

    def fail_at_third(setup, patches, unit, *rest):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(unit.key)
        return solve(setup, patches, unit, *rest)

    monkeypatch.setattr(exact_run, "_solve", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        run_trained_probe(make_config("parts"), "segmentation")
    again = []
    monkeypatch.setattr(exact_run, "_solve", lambda setup, p, unit, *rest: (again.append(unit.key), solve(setup, p, unit, *rest))[1])  # fmt: skip  # noqa: E501

    def fail_at_test(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(exact_run, "_read_truth", fail_at_test)
    with pytest.raises(KeyboardInterrupt):
        run_trained_probe(make_config("parts"), "segmentation")
    assert solved == ["original", "duplicate"] and again == ["tuned", "add", "concat"]
    monkeypatch.setattr(exact_run, "_read_truth", read_truth)
    run_trained_probe(make_config("parts"), "segmentation")
    assert len(again) == 3, "a solved row is not solved again"
    whole, parts = (_metrics(tmp_path / name) for name in ("whole", "parts"))
    for row, values in whole["rows"].items():
        assert parts["rows"][row]["miou"] == values["miou"], row
    monkeypatch.setattr(exact_run, "_read_truth", fail_at_test)
    run_trained_probe(make_config("parts"), "segmentation")
    with pytest.raises(UserError, match="parts holds the results of another probe.*long_side.*--output-dir"):
        run_trained_probe(make_config("parts", long_side=64), "segmentation")


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_patches_read_from_disk_give_the_same_maps(make_config, tmp_path, monkeypatch, kind):
    config_type = {"segmentation": SegmentationConfig, "depth": DepthConfig}[kind]
    run_trained_probe(make_config("memory", config_type), kind)
    monkeypatch.setattr(patches, "_free_memory", lambda device: 0.0)
    run_trained_probe(make_config("disk", config_type), kind)
    found = _maps(tmp_path / "disk")
    for name, weight in _maps(tmp_path / "memory").items():
        torch.testing.assert_close(found[name], weight, rtol=2e-2, atol=2e-3)


def test_tasks_on_the_same_photos_share_their_features(weights, tmp_path):
    shared = tmp_path / "shared"
    arguments = f"--dataset rooms --data {TINY_ROOM} --backbone {TINY} --backbone-weights {weights['original']}"
    files = []
    for kind in ("segmentation", "depth", "normals"):
        common = [kind, *arguments.split(), "--workers", "0", "--device", "cpu", "--assemblies", "original"]
        main([*common, "--cache-dir", str(shared), "--output-dir", str(tmp_path / kind)])
        main([*common, "--output-dir", str(tmp_path / f"{kind}_alone")])
        files.append({path: path.stat().st_mtime_ns for path in shared.rglob("*") if path.is_file()})
        rows, alone = (_metrics(tmp_path / name)["rows"]["original"] for name in (kind, f"{kind}_alone"))
        assert rows.pop("seconds") and alone.pop("seconds")
        assert json.dumps(rows) == json.dumps(alone), "classes without a patch are NaN"
    assert files[0] and files[0] == files[1] == files[2]


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_two_processes_give_what_one_gives(make_config, weights, tmp_path, kind):
    """Six training photos in one shard: the second process has none at all; three test photos, one for the second."""
    config_type = {"segmentation": SegmentationConfig, "depth": DepthConfig}[kind]
    run_trained_probe(make_config("one", config_type), kind)
    config = make_config("two")
    arguments = [kind, "--data", config.data, "--backbone", TINY, "--backbone-weights", weights["original"]]
    probe_in_two_processes([*arguments, "--tuned", weights["tuned"], "--output-dir", tmp_path / "two"])
    one, two = _metrics(tmp_path / "one"), _metrics(tmp_path / "two")
    headline = "miou" if kind == "segmentation" else "rmse"
    for row, values in one["rows"].items():
        assert two["rows"][row][headline]["mean"] == pytest.approx(values[headline]["mean"], abs=2e-3), row
    assert two["command"].startswith(f"torchrun --nproc-per-node 2 -m probe.cli {kind}")
    assert len(list((tmp_path / "two" / "panels").iterdir())) == len(list((tmp_path / "one" / "panels").iterdir()))


def test_all_rows_have_the_decay_that_the_first_chose(make_config, tmp_path):
    run_trained_probe(make_config("all"), "segmentation")
    found = _metrics(tmp_path / "all")["decay"]
    assert found["chosen_by"] == "original" and len(found["held_out"]) >= 2
    assert found["decay"] == max((float(name) for name in found["held_out"]), key=lambda d: found["held_out"][f"{d:g}"])
    used = {}
    for path in sorted((tmp_path / "all" / "rows").glob("*.safetensors")):
        if ".sums" not in path.name:
            with safe_open(path, framework="pt") as file:
                used[path.stem] = json.loads(file.metadata()["facts"])["decay"]
    assert len(used) >= 4 and set(used.values()) == {found["decay"]}
    # Whoever is first chooses: here the student.
    run_trained_probe(make_config("alone", assemblies=("tuned",)), "segmentation")
    assert _metrics(tmp_path / "alone")["decay"]["chosen_by"] == "tuned"


@pytest.mark.parametrize(("total", "share", "count", "longest"), [(398, 0.1, 40, 10), (40, 0.2, 8, 4), (5, 0.1, 1, 1)])
def test_photos_are_held_out_in_blocks_all_over(total, share, count, longest):
    held = exact_run._hold_out(SimpleNamespace(train=range(total)), share, 1000)  # type: ignore[arg-type]
    assert len(held) == count == len(set(held)) and set(held) <= set(range(total))
    starts = [place for place in held if place - 1 not in held]
    assert all(place in held for start in starts for place in range(start, min(start + longest, total)))
    assert len(starts) == 1 or held[-1] - held[0] > total / 2
    with pytest.raises(UserError, match="too few to hold some out"):
        exact_run._hold_out(SimpleNamespace(train=range(1)), share, 1000)  # type: ignore[arg-type]


def test_the_test_split_chooses_nothing(make_config, tmp_path):
    config = make_config("right", assemblies=("original",), tuned=())
    run_trained_probe(config, "segmentation")
    for path in (config.data / "testannot").iterdir():
        labels = np.array(Image.open(path))
        save_png(path, np.where(labels == 255, 255, (labels + 1) % 3).astype(np.uint8))
    run_trained_probe(make_config("turned", assemblies=("original",), tuned=()), "segmentation")
    right, turned = (_metrics(tmp_path / name) for name in ("right", "turned"))
    assert right["decay"] == turned["decay"] and right["decay"]["held_out"]
    right, turned = (metrics["rows"]["original"] for metrics in (right, turned))
    assert right["miou"]["mean"] > turned["miou"]["mean"] + 0.1
    for name, weight in _maps(tmp_path / "right").items():
        assert torch.equal(weight, _maps(tmp_path / "turned")[name])


def test_a_student_is_probed_as_its_card_says(make_config, make_result, weights, tmp_path, caplog):
    """At a middle block, before the norm and with its own normalisation, as `load` gives its features."""
    caplog.set_level("INFO", "probe")
    student = make_result("student", layer=2, norm=False, normalization="own")
    config = make_config("out", backbone=None, tuned=(student,), assemblies=("tuned",))
    run_trained_probe(config, "segmentation")
    assert "block 2 of 0 to 5, before the final norm" in caplog.text
    module = load(student, "tuned")
    photo = torch.from_numpy(np.array(Image.open(config.data / "test" / "photo_0.png"))).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = module(photo)[0]
    (test_store,) = [
        found
        for path in (tmp_path / "out" / "features").glob("*/*.safetensors")
        if len((found := load_file(path))["tuned.patch_tokens"]) == 3  # photos; training has six
    ]
    torch.testing.assert_close(test_store["tuned.patch_tokens"][0, 0].float(), expected, rtol=1e-2, atol=1e-2)
    default = load(str(weights["tuned"]), "tuned", backbone=TINY)(photo)[0]
    assert (default - expected).abs().mean() > 0.1, "the card makes a difference"


def test_what_contradicts_a_card_is_refused(make_config, make_result, weights, tmp_path):
    student = make_result("student", layer=2, normalization="own")
    plain = make_result("plain")

    def fails(match, **options):
        with pytest.raises(UserError, match=match) as error:
            run_trained_probe(make_config("bad", **options), "segmentation")
        assert "\n" not in str(error.value)

    fails(
        "student was fine-tuned with --normalization own.*--normalization imagenet",
        tuned=(student,),
        normalization="imagenet",
    )
    fails("plain was fine-tuned with --final-norm on.*--final-norm off", tuned=(plain,), final_norm="off")
    fails("student was fine-tuned with --layer 2.*one by one", tuned=(plain, student))
    fails("was fine-tuned from test_vit.*not from test_vit2", tuned=(plain,), backbone="test_vit2.r160_in1k")
    foreign = make_result("foreign", original="control")
    fails("foreign was fine-tuned from other weights than those.*--backbone-weights", tuned=(foreign,))
    assert not (tmp_path / "bad").exists()
    # The paper's depth probe reads before the norm, whatever the card says; and alone a student needs no original.
    options = {"protocol": "fast", "iterations": 2, "learning_rates": (1e-2,), "batch_size": 2}
    run_trained_probe(make_config("depth", DepthConfig, tuned=(plain,), **options), "depth")
    assert "before the final norm" in _metrics(tmp_path / "depth")["features"]
    run_trained_probe(make_config("on", DepthConfig, tuned=(plain,), final_norm="on", **options), "depth")
    assert "after the final norm" in _metrics(tmp_path / "on")["features"]
    run_trained_probe(make_config("alone", tuned=(foreign,), assemblies=("tuned",)), "segmentation")


def test_mistakes_are_said_in_one_sentence(make_config, weights, colored_blocks, tmp_path):
    seen: list[str] = []

    def fails(match, **options):
        with pytest.raises(UserError, match=match) as error:
            run_trained_probe(make_config(f"bad_{len(seen)}", **options), "segmentation")
        seen.append(match)
        assert "\n" not in str(error.value)

    tuned = str(weights["tuned"])
    fails("--control compares with a fine-tuned backbone", tuned=(), control=(tuned,))
    fails("is given twice", tuned=(tuned, f"again={tuned}"))
    fails("same is a name of --tuned already", tuned=(f"same={tuned}",), control=(f"same={weights['control']}",))
    fails("--iterations is for heads that are trained.*--protocol fast or paper", iterations=5)
    fails("--seeds is for heads", seeds=(1, 2))
    fails("--assemblies linear is concat once both are solved", assemblies=("linear",))
    fails("--long-side 0 is too small", long_side=0)
    fails("is another tuned, and --protocol fast takes no mean over students", protocol="fast",
          tuned=(tuned, str(weights["control"])))  # fmt: skip
    fails("1 training samples are too few", data=colored_blocks("single", train=1))
    state = load_file(weights["tuned"])
    broken = tmp_path / "broken.safetensors"
    save_file({name: value * float("nan") for name, value in state.items()}, broken)
    fails("broken.safetensors is damaged .*NaN.*--tuned", tuned=(str(broken),))
    save_file({name: value * 1e30 for name, value in state.items()}, broken)  # finite, and too large to compute with
    fails("features of tuned are not finite.*photo_0.png", tuned=(str(broken),))
    one = colored_blocks("one_class")
    (one / "classes.txt").write_text("red\ngreen\nblue\n")
    for path in (one / "trainannot").iterdir():
        save_png(path, np.zeros_like(np.array(Image.open(path))))
    fails("Only one class occurs in the training photos", data=one)
    assert not list(tmp_path.glob("bad_*/metrics.json"))


@pytest.mark.parametrize("name", ["table.md", "report.html", "metrics.json"])
@pytest.mark.parametrize("protocol", ["exact", "fast"])
def test_a_folder_where_a_file_of_the_result_goes(make_config, tmp_path, monkeypatch, name, protocol):
    monkeypatch.setattr(FeatureStore, "fill", lambda *_: pytest.fail("features were computed"))
    (tmp_path / "out" / name).mkdir(parents=True)
    options = {"protocol": "fast", "iterations": 3} if protocol == "fast" else {}
    with pytest.raises(UserError, match=f"{name} is a folder, and a file of the result goes there"):
        run_trained_probe(make_config("out", **options), "segmentation")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_the_numbers_come_after_all_that_they_vouch_for(make_config, tmp_path, monkeypatch):
    for number, (protocol, module) in enumerate((("exact", report), ("fast", output_folder))):
        write_record = module.write_record

        def write(path, content):
            assert path.name == "metrics.json" and (path.parent / "table.md").is_file()
            assert (path.parent / "report.html").is_file()
            write_record(path, content)

        monkeypatch.setattr(module, "write_record", write)
        options = {"protocol": "fast", "iterations": 3} if protocol == "fast" else {}
        run_trained_probe(make_config(f"out_{number}", assemblies=("original",), **options), "segmentation")
        assert (tmp_path / f"out_{number}" / "metrics.json").is_file()


def test_what_the_truth_lacks_is_said(make_config, colored_blocks, tmp_path):
    root = colored_blocks("lacking")
    (root / "classes.txt").write_text("red\ngreen\nblue\nunicorn\n")
    save_png(root / "trainannot" / "photo_1.png", np.full((48, 64), 255, np.uint8))
    save_png(root / "testannot" / "photo_2.png", np.full((48, 64), 255, np.uint8))
    run_trained_probe(make_config("out", data=root, tuned=()), "segmentation")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "1 training photos have no pixel with a truth" in table and "1 test photos have no pixel" in table
    assert "1 classes never occur in the training photos and are never predicted: unicorn." in table
    found = _metrics(tmp_path / "out")["rows"]["original"]
    assert found["miou"]["mean"] > 0.6 and found["iou"]["unicorn"]["mean"] is None
