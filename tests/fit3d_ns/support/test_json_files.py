"""Records: JSON objects with a checksum of their fields."""

import json
import math

import pytest

from fit3d_ns.support.errors import DamagedFile
from fit3d_ns.support.json_files import read_record, write_record

CONTENT = {
    "name": "ü",
    "numbers": {10: 1, 9: 2, 2: [0.1, 1e-30]},  # whose order is another one as texts
    "shares": {0.0: "a", 0.25: "b", 1.0: "c"},
    "pair": (1, 2.5),
    "nothing": None,
    "flag": True,
    "not finite": math.nan,
}


def test_what_is_written_is_read(tmp_path):
    write_record(tmp_path / "a.json", CONTENT)
    read = read_record(tmp_path / "a.json")
    assert read.keys() == CONTENT.keys()
    assert read["numbers"] == {"10": 1, "9": 2, "2": [0.1, 1e-30]} and read["pair"] == [1, 2.5]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(flag=False),
        lambda record: record.update(flag=1.5),
        lambda record: record["numbers"].update({"9": 3}),
        lambda record: record["numbers"].update({"9": "2"}),
        lambda record: record["numbers"].pop("10"),
        lambda record: record.update(more=1),
        lambda record: record.update(checksum="0"),
    ],
)
def test_another_field_is_found(tmp_path, change):
    path = tmp_path / "a.json"
    write_record(path, CONTENT)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DamagedFile, match="its checksum differs"):
        read_record(path)


def test_order_and_blanks_are_no_damage(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, CONTENT)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(record.items())), indent=7))
    assert read_record(path) == {name: value for name, value in record.items() if name != "checksum"}


def test_a_record_of_an_earlier_version_has_no_checksum(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_record(tmp_path / "a.json") == {"a": 1}
