"""What the records say: the table, the curve over the number of scenes, and how well rules without labels choose."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fit3d_ns.support.files import atomic_write_json, atomic_write_text

Row = dict[str, Any]

SCORES: dict[str, tuple[str, Callable[[Row], float], bool]] = {
    "nyu_miou": ("NYUv2 mIoU (%)", lambda labelled: 100 * labelled["nyu"]["miou"], True),
    "nyu_rmse": ("NYUv2 RMSE (m)", lambda labelled: labelled["nyu"]["rmse"], False),
    "camvid_miou": ("CamVid mIoU (%)", lambda labelled: 100 * labelled["camvid"]["miou"], True),
    "match": ("match", lambda labelled: labelled["match"], True),
}
"""Title, how it is read, and whether more is better."""
DRIFTS = (0.84, 0.86, 0.88, 0.90, 0.92)


def write_tables(records: Path, output: Path) -> None:
    """Writes ``summary.json`` and ``table.md``.

    Args:
        records: Folder of the pieces' records.
        output: Where the two go.
    """
    development, test = (_read(records / stage) for stage in ("development", "test"))
    summary = {
        "decays": _original(records / "development").get("decays"),
        "development": _groups(development, _original(records / "development")),
        "test": _groups(test, _original(records / "test")),
        "rules": rules(list(development.values())),
    }
    atomic_write_json(output / "summary.json", summary)
    text = ["# Test frames\n", _table(summary["test"]), "\n# Development frames\n", _table(summary["development"])]
    text += ["\n# Rules for the share of the student, development frames\n", _rule_table(summary["rules"])]
    atomic_write_text(output / "table.md", "\n".join(text))


def _read(folder: Path) -> dict[str, Row]:
    paths = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths if path.stem != "original"}


def _original(folder: Path) -> Row:
    path = folder / "original.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _groups(students: dict[str, Row], original: Row) -> list[Row]:
    """Mean and spread over seeds of students that differ in nothing else; the original first."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for name, record in students.items():
        steps = record["steps"] if name.endswith("steps") else None
        for row in record["rows"]:
            drift = _mean(values["drift"] for values in row.get("unlabelled", {}).get("training", {}).values())
            key = (record["kind"], len(record["scenes"]), record["round"], steps, row["amount"])
            groups[key].append({**_scores(row["labelled"]), "drift": drift})
    rows: list[Row] = []
    if original:
        rows.append({"kind": "original", "seeds": 1, **{k: [v, 0.0] for k, v in _scores(original["labelled"]).items()}})
    for (kind, scenes, number, steps, amount), members in sorted(groups.items(), key=lambda item: _order(item[0])):
        row = {"kind": kind, "scenes": scenes, "round": number, "steps": steps, "amount": amount}
        row["seeds"] = len(members)
        for name in (*SCORES, "drift"):
            values = [member[name] for member in members if member[name] is not None]
            if values:
                row[name] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
        rows.append(row)
    return rows


def _scores(labelled: Row) -> dict[str, float]:
    return {name: read(labelled) for name, (_, read, _) in SCORES.items()}


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _order(key: tuple) -> tuple:
    kind, scenes, number, steps, amount = key
    return kind != "lifted", kind, -scenes, number, steps or 0, amount


def _table(rows: Sequence[Row]) -> str:
    lines = ["| targets | scenes | round | steps | A | seeds | " + " | ".join(t for t, _, _ in SCORES.values())]
    lines[0] += " | drift |"
    lines.append("|---" * (7 + len(SCORES)) + "|")
    digits = {"nyu_miou": 2, "nyu_rmse": 3, "camvid_miou": 2, "match": 3, "drift": 2}
    for row in rows:
        cells = [row["kind"], *(str(row.get(name) or "") for name in ("scenes", "round", "steps", "amount", "seeds"))]
        for name, places in digits.items():
            mean, spread = row.get(name, (None, 0.0))
            if mean is None:
                cells.append("")
            else:
                cells.append(f"{mean:.{places}f}" + (f" ± {spread:.{places}f}" if spread else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rules(students: Sequence[Row]) -> list[Row]:
    """Compares rules that choose the share of the student: what each loses to the best share of each score.

    Args:
        students: Records of the stage `development`; those of lifted targets count.

    Returns:
        For each rule: the shares it chose, and by score the mean loss over students against the best of the shares
        measured, in the unit of the score and never negative.
    """
    lifted = [record for record in students if record["kind"] == "lifted" and len(record["rows"]) > 2]
    choices: dict[str, Callable[[Row], float | None]] = {}
    measured = [{row["amount"] for row in record["rows"]} for record in lifted]
    for amount in sorted(set.intersection(*measured)) if measured else ():
        choices[f"always {amount:g}"] = lambda record, amount=amount: amount
    for drift in DRIFTS:
        for part in ("training", "validation"):
            choices[f"drift {drift:g} on {part} scenes"] = lambda record, drift=drift, part=part: _closest(
                record, part, drift
            )
    for part in ("training", "validation"):
        for measure in ("match", "cosine"):
            choices[f"most {measure} on {part} scenes"] = lambda record, part=part, measure=measure: _most(
                record, part, measure
            )
    for name, (_, read, more) in SCORES.items():
        choices[f"best {name} (needs labels)"] = lambda record, read=read, more=more: _best(record, read, more)[
            "amount"
        ]
    table = []
    for rule, choose in choices.items():
        losses: dict[str, list[float]] = defaultdict(list)
        chosen = []
        for record in lifted:
            amount = choose(record)
            if amount is None:
                continue
            chosen.append(amount)
            row = next(row for row in record["rows"] if row["amount"] == amount)
            for name, (_, read, more) in SCORES.items():
                best = read(_best(record, read, more)["labelled"])
                losses[name].append(abs(best - read(row["labelled"])))
        if chosen:
            means = {name: statistics.fmean(values) for name, values in losses.items()}
            table.append({"rule": rule, "students": len(chosen), "amount": statistics.fmean(chosen), "losses": means})
    return table


def _best(record: Row, read: Callable[[Row], float], more: bool) -> Row:
    return (max if more else min)(record["rows"], key=lambda row: read(row["labelled"]))


def _measured(record: Row, part: str, measure: str) -> list[tuple[float, float]]:
    """Pairs of share and mean over scenes of a measure without labels."""
    pairs = []
    for row in record["rows"]:
        mean = _mean(values.get(measure) for values in row["unlabelled"][part].values())
        if mean is not None:
            pairs.append((row["amount"], mean))
    return pairs


def _closest(record: Row, part: str, drift: float) -> float | None:
    pairs = _measured(record, part, "drift")
    return min(pairs, key=lambda pair: abs(pair[1] - drift))[0] if pairs else None


def _most(record: Row, part: str, measure: str) -> float | None:
    pairs = _measured(record, part, measure)
    return max(pairs, key=lambda pair: pair[1])[0] if pairs else None


def _rule_table(table: Sequence[Row]) -> str:
    lines = ["| rule | students | mean A | " + " | ".join(title for title, _, _ in SCORES.values()) + " |"]
    lines.append("|---" * (3 + len(SCORES)) + "|")
    for row in table:
        losses = " | ".join(f"{row['losses'][name]:.3f}" for name in SCORES)
        lines.append(f"| {row['rule']} | {row['students']} | {row['amount']:.2f} | {losses} |")
    return "\n".join(lines)
