"""The evidence: steps are done once and in order, choices see no test frame, tables and pages say what records say."""

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from paths import ROOT, TINY_ROOM
from torch import nn

from benchmarks.evidence.config import EvidenceConfig
from benchmarks.evidence.figure import draw
from benchmarks.evidence.labelled import LabelledPhotos, score
from benchmarks.evidence.pieces import Piece, Records, run_command, run_pieces, to_do
from benchmarks.evidence.plan import Plan
from benchmarks.evidence.students import all_students, order_of_scenes, without_last_frames
from benchmarks.evidence.tables import rules, write_tables
from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.errors import UserError

RESULTS = ROOT / "benchmarks" / "results" / "evidence"
PLACES = {"one": 1, "other": 2}


def config(tmp_path: Path, **changes) -> EvidenceConfig:
    scenes = []
    for name in ("a", "b", "c", "d"):
        scenes.append(tmp_path / name)
        scenes[-1].mkdir(exist_ok=True)
        (scenes[-1] / "transforms.json").write_text((TINY_ROOM / "transforms.json").read_text())
    given = {"scenes": tuple(scenes), "nyu": tmp_path, "camvid": tmp_path, "match": tmp_path, "device": "cpu"}
    return EvidenceConfig(**{**given, "output": tmp_path / "out", **changes})


def test_pieces_run_in_the_order_of_what_they_need_and_once(tmp_path: Path) -> None:
    order: list[str] = []

    def piece(name: str, needs: tuple[str, ...], rank: int) -> Piece:
        return Piece(name, "stage", "one", lambda: order.append(name) or {"of": name}, needs, rank=rank)

    pieces = [piece("last", ("first", "deep/second"), 0), piece("deep/second", ("first",), 1), piece("first", (), 2)]
    records = Records(tmp_path)
    run_pieces(to_do(pieces, records, ()), records, PLACES)
    assert order == ["first", "deep/second", "last"]
    assert records.read("deep/second")["of"] == "deep/second"
    assert to_do(pieces, records, ()) == []
    records.path("last").unlink()
    run_pieces(to_do(pieces, records, ()), records, PLACES)
    assert order == ["first", "deep/second", "last", "last"]


def test_some_of_the_pieces_are_chosen_by_their_names(tmp_path: Path) -> None:
    pieces = [Piece(name, "stage", "one", dict) for name in ("test/a-seed1", "test/a-seed2", "students/a-seed1")]
    chosen = to_do(pieces, Records(tmp_path), (), "^test/.*seed1$")
    assert [piece.name for piece in chosen] == ["test/a-seed1"]
    with pytest.raises(UserError, match=r"--pieces \( is no regular expression"):
        to_do(pieces, Records(tmp_path), (), "(")


def test_commands_are_spread_over_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    started = threading.Barrier(4)

    def run(command: list, log: Path, environment: dict) -> dict:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        started.wait(10)
        return {}

    monkeypatch.setattr("benchmarks.evidence.plan.run_command", run)
    records = Records(tmp_path / "records")
    plan = Plan(config(tmp_path, devices=2), records)
    run_pieces(to_do(plan.pieces, records, ("geometry",)), records, {"scene": 4, "light": 1})
    assert sorted(seen) == ["0", "0", "1", "1"]


def test_ranks_decide_among_pieces_that_could_start(tmp_path: Path) -> None:
    order: list[int] = []
    pieces = [Piece(str(n), "stage", "one", lambda n=n: order.append(n) or {}, rank=-n) for n in range(5)]
    records = Records(tmp_path)
    run_pieces(to_do(pieces, records, ()), records, PLACES)
    assert order == [4, 3, 2, 1, 0]


def test_a_piece_that_fails_leaves_no_record_and_stops_only_what_needs_it(tmp_path: Path) -> None:
    def fail() -> dict:
        raise UserError("The disk is full.")

    pieces = [
        Piece("bad", "stage", "one", fail),
        Piece("after", "stage", "one", dict, ("bad",)),
        Piece("independent", "stage", "other", dict),
    ]
    records = Records(tmp_path)
    with pytest.raises(UserError, match=r"bad: The disk is full.*1 more need what is missing \(after"):
        run_pieces(pieces, records, PLACES)
    assert not records.has("bad") and not records.has("after") and records.has("independent")


def test_a_command_that_fails_is_one_sentence_with_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    assert run_command(["sh", "-c", "echo hello"], log, {"PATH": "/bin:/usr/bin"})["command"] == "sh -c echo hello"
    assert log.read_text() == "hello\n"
    with pytest.raises(UserError, match=r"status 3 \(reason\)"):
        run_command(["sh", "-c", "echo reason; exit 3"], log, {"PATH": "/bin:/usr/bin"})


def test_every_seed_starts_its_curve_elsewhere_and_goes_through_all_scenes() -> None:
    orders = [order_of_scenes("abcdefgh", (1, 2, 3), seed) for seed in (1, 2, 3)]
    assert len({order[0] for order in orders}) == 3
    assert all(sorted(order) == list("abcdefgh") for order in orders)


def test_controls_go_through_the_recipe_of_what_they_control(tmp_path: Path) -> None:
    plan = config(tmp_path, curve=(1, 2), rounds=2, control_rounds=2)
    students = all_students(plan, ("a", "b", "c", "d"))
    assert len({student.name for student in students}) == len(students)
    lifted = {(s.scenes, s.round, s.seed, s.steps) for s in students if s.kind == "lifted"}
    assert len(lifted) == 3 * (2 + 2)
    for kind in ("control", "control-shift"):
        assert {(s.scenes, s.round, s.seed, s.steps) for s in students if s.kind == kind} == lifted
    assert {(s.scenes, s.round, s.seed, s.steps) for s in students if s.kind == "control-blur"} <= lifted


def test_every_step_needs_steps_that_exist_and_none_needs_itself(tmp_path: Path) -> None:
    pieces = Plan(config(tmp_path, other_steps=(7,)), Records(tmp_path / "records")).pieces
    names = [piece.name for piece in pieces]
    assert len(set(names)) == len(names)
    done: set[str] = set()
    while len(done) < len(names):
        ready = {piece.name for piece in pieces if piece.name not in done and set(piece.needs) <= done}
        assert ready, f"a circle among {sorted(set(names) - done)}"
        done |= ready


def test_later_rounds_are_taught_by_the_round_before_of_their_own_seed(tmp_path: Path) -> None:
    pieces = {piece.name: piece for piece in Plan(config(tmp_path), Records(tmp_path / "records")).pieces}
    lift = pieces["lifts/lifted-round3-seed2"]
    assert lift.needs == ("students/lifted-4scenes-round2-seed2",)
    assert pieces["students/lifted-4scenes-round3-seed2"].needs == ("bundles/lifted-round3-seed2",)


def test_the_last_frames_are_left_out_of_training(tmp_path: Path) -> None:
    folder = without_last_frames(TINY_ROOM, 4, tmp_path / "kept")
    kept = json.loads((folder / "transforms.json").read_text())["frames"]
    every = sorted(frame["file_path"] for frame in json.loads((TINY_ROOM / "transforms.json").read_text())["frames"])
    assert [Path(frame["file_path"]) for frame in kept] == [TINY_ROOM / name for name in every[:-4]]
    assert all(Path(frame["file_path"]).is_file() and "depth_file_path" not in frame for frame in kept)


class _Colors(nn.Module):
    """Features that are the mean colour of a patch, beside a constant."""

    def forward(self, images: torch.Tensor) -> BackboneOutput:
        pooled = torch.nn.functional.avg_pool2d(images, 14)
        return BackboneOutput(torch.cat([pooled, torch.ones_like(pooled[:, :1])], 1), None)


def _photos(num_training: int, num_test: int) -> LabelledPhotos:
    """Photos whose patches have a colour for each class, and whose depth is told by it."""
    generator = torch.Generator().manual_seed(1)
    count = num_training + num_test
    patch_labels = torch.randint(0, 3, (count, 4, 5), generator=generator)
    labels = patch_labels.repeat_interleave(14, 1).repeat_interleave(14, 2)
    images = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).mul(200).to(torch.uint8)
    depth = 1.0 + labels.float()
    return LabelledPhotos(
        images, labels.to(torch.uint8), patch_labels, 3, num_training, depth, (1.0 + patch_labels.float()).log()
    )


@pytest.mark.parametrize("part", ["development", "test"])
def test_features_that_tell_everything_score_far_above_those_that_tell_nothing(part: str) -> None:
    photos = _photos(40, 6)
    known = score(_Colors(), photos, part, 1e-6)  # type: ignore[arg-type]
    torch.manual_seed(0)
    shuffled = LabelledPhotos(
        photos.images[torch.randperm(46)],
        photos.labels,
        photos.patch_labels,
        3,
        40,
        photos.depth,
        photos.patch_log_depth,
    )
    unknown = score(_Colors(), shuffled, part, 1e-6)  # type: ignore[arg-type]
    assert known["miou"] > 0.75  # bilinear resizing blurs the borders of patches
    assert unknown["miou"] < 0.45
    assert known["rmse"] < 0.5 < unknown["rmse"]


def test_choices_are_made_on_training_frames_in_blocks_and_test_frames_stay_out() -> None:
    photos = _photos(70, 5)
    fit, development = photos.split("development")
    assert development == list(range(20, 30)) + list(range(70, 70))
    assert sorted([*fit, *development]) == list(range(70))
    assert photos.split("test") == (list(range(70)), list(range(70, 75)))


def _record(best: float, drift_at_one: float) -> dict:
    rows = []
    for amount in (0.25, 0.5, 0.75, 1.0):
        value = 0.3 - (amount - best) ** 2
        labelled = {"nyu": {"miou": value, "rmse": 1 - value}, "camvid": {"miou": value}, "match": amount}
        scene = {"drift": 1 - (1 - drift_at_one) * amount, "match": amount, "cosine": amount}
        rows.append(
            {"amount": amount, "labelled": labelled, "unlabelled": {"training": {"s": scene}, "validation": {}}}
        )
    return {"kind": "lifted", "rows": rows}


def test_a_rule_loses_nothing_where_it_chooses_the_best_share_and_what_it_misses_elsewhere() -> None:
    table = {row["rule"]: row for row in rules([_record(0.5, 0.8), _record(0.75, 0.867)])}
    by_drift = table["drift 0.9 on training scenes"]
    assert by_drift["amount"] == pytest.approx(0.625)
    assert by_drift["losses"]["nyu_miou"] == pytest.approx(0)
    assert table["always 0.5"]["losses"]["nyu_miou"] == pytest.approx(100 * 0.25**2 / 2)
    assert table["most match on training scenes"]["amount"] == 1
    assert "most match on validation scenes" not in table


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    write_tables(RESULTS, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    page = (ROOT / "docs" / "gain.md").read_text()
    largest = max(row["scenes"] for row in summary["test"] if row["kind"] != "original")
    for row in summary["test"]:
        label = "original"
        if row["kind"] != label:
            count, name = row["scenes"], row["kind"] if row["kind"] == "lifted" else f"`{row['kind']}`"
            set_up = f"round {row['round']}" if count == largest else f"{count} scene{'s' if count > 1 else ''}"
            label = f"{name}, {set_up}, {'averaged' if row['amount'] < 1 else 'not averaged'}"
        found = re.search(rf"^\| (\*\*)?{re.escape(label)}(\*\*)? \|(.*)\|$", page, re.MULTILINE)
        assert found, label
        cells = [re.findall(r"\d*\.\d+", cell) for cell in found[3].split("|")]
        for cell, name in zip(cells, ("nyu_miou", "nyu_rmse", "camvid_miou", "match"), strict=True):
            for text, value in zip(cell, row[name]):
                places = len(text.split(".")[1])
                assert float(text) == pytest.approx(value, abs=0.500001 * 10**-places), (label, name)
    assert len(draw(summary).axes) == 3


VARIANTS = {
    "weighted by disagreement": ("disagree", 0.6),
    "weighted by agreement": ("agree", 0.6),
    "renders divided by opacity": ("norm", 0.6),
    "teacher sees photos 1.5 times as large, for lifting": ("x15", 0.6),
    "twice as large": ("x2", 0.6),
    "photos at three sizes": ("scales", 0.6),
    "A from .75 at the first block to .45 at the last": ("depth", [0.75, 0.45]),
    "A from .45 to .75": ("depth", [0.45, 0.75]),
    "A from .9 to .3": ("depth", [0.9, 0.3]),
    "A from .3 to .9": ("depth", [0.3, 0.9]),
    "mean of three students (one)": ("soup-round1", 0.6),
}


def test_the_page_says_what_the_records_of_the_variants_say() -> None:
    page = (ROOT / "docs" / "gain.md").read_text()
    records = [json.loads(path.read_text()) for path in (RESULTS / "variants").glob("*.json")]
    for label, (variant, amount) in VARIANTS.items():
        found = re.search(rf"^\| {re.escape(label)} \|(.*)\|$", page, re.MULTILINE)
        assert found, label
        texts = [re.findall(r"\d*\.\d+", cell)[0] for cell in found[1].split("|")]
        labelled = [r["labelled"] for r in records if (r["variant"], r["amount"]) == (variant, amount)]
        assert len(labelled) == (1 if variant.startswith("soup") else 3)
        scores = {
            "miou": [100 * row["nyu"]["miou"] for row in labelled],
            "rmse": [row["nyu"]["rmse"] for row in labelled],
            "camvid": [100 * row["camvid"]["miou"] for row in labelled],
            "match": [row["match"] for row in labelled],
        }
        for text, values in zip(texts, scores.values(), strict=True):
            places = len(text.split(".")[1])
            assert float(text) == pytest.approx(sum(values) / len(values), abs=0.500001 * 10**-places), label
