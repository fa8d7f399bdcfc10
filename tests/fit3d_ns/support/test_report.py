"""Reports are one whole file that shows what it was given, and files are never half-written."""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_path, atomic_write_bytes, atomic_write_json, atomic_write_text
from fit3d_ns.support.html_report import Report


class Page(HTMLParser):
    """Texts, images and tags of a page; fails on tags that do not close."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = {name: value or "" for name, value in attrs}
        self.links += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style" and data.strip():
            self.texts.append(data.strip())


def decode(image: dict[str, str]) -> np.ndarray:
    prefix = "data:image/png;base64,"
    assert image["src"].startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"][len(prefix) :]))))


def test_everything_is_escaped_embedded_and_without_network():
    nasty = "<script>alert('&\"')</script>"
    report = Report(nasty)
    report.add_heading(nasty)
    report.add_text(nasty)
    report.add_code(nasty)
    report.add_table([[nasty, 1.23456789, None, 7]], header=[nasty, "value", "missing", "count"])
    report.add_pictures([(nasty, np.zeros((4, 4, 3)))], title=nasty)
    report.add_curve(nasty, {nasty: ([0, 1], [2, 3])}, nasty, "$loss_{")
    page = Page(report.to_html())
    assert "script" not in page.tags
    assert sum(nasty in text for text in page.texts) == 12  # the title stands twice; ten more places
    assert {"1.235", "–", "7", "$loss_{"} <= set(page.texts)
    assert page.images[0]["alt"] == nasty
    assert all(link.startswith(("data:", "#")) for link in page.links)


def test_pictures_keep_their_pixels_and_small_maps_stay_crisp():
    photo = np.random.default_rng(0).integers(0, 255, (150, 200, 3), dtype=np.uint8)
    patches = torch.rand(9, 12, 3)
    patches[0, 0] = torch.tensor([float("nan"), -1.0, 2.0])
    report = Report("pictures")
    report.add_pictures([("photo", photo), ("patches", patches), ("depth", np.linspace(0, 1, 12).reshape(3, 4))])
    shown = Page(report.to_html()).images
    np.testing.assert_array_equal(decode(shown[0]), photo)
    expected = np.round(patches.nan_to_num().clamp(0, 1).numpy() * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode(shown[1]), expected)
    assert expected[0, 0].tolist() == [0, 0, 255]
    assert decode(shown[2]).shape == (3, 4, 3)
    assert [image.get("class") for image in shown] == [None, "patches", "patches"]


def test_tensors_of_bytes_and_large_photos():
    large = torch.zeros(1200, 1600, 3, dtype=torch.uint8)
    large[:, 800:] = 200
    report = Report("large")
    report.add_pictures([("large", large)])
    shown = decode(Page(report.to_html()).images[0])
    assert shown.shape == (480, 640, 3)
    assert shown[:, :300].max() == 0 and shown[:, 340:].min() == 200


@pytest.mark.parametrize("shape", [(3, 8, 8), (8,), (8, 8, 4), (0, 8, 3)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ValueError, match="picture"):
        Report("x").add_pictures([("bad", np.zeros(shape))])


def test_curves_are_drawn_with_gaps_and_named():
    report = Report("curves")
    report.add_curve(
        "loss", {"train": (list(range(100)), [math.nan, *range(99)]), "_held out": ([0, 50], [1.0, 2.0])}, "step", "L1"
    )
    report.add_curve("empty", {}, "step", "L1")
    source = report.to_html()
    page = Page(source)
    assert {"train", "_held out", "step", "L1"} <= set(page.texts)
    colors = re.findall(r'<i style="background:(#\w+)"', source)
    assert len(set(colors)) == 2
    assert all(f"stroke: {color}" in source for color in colors)


def test_same_input_gives_the_same_file(tmp_path):
    for name in ("a.html", "b.html"):
        report = Report("same")
        report.add_curve("loss", {"train": ([0, 1, 2], [3.0, 2.0, 1.0])}, "step", "L1")
        report.write(tmp_path / "deep" / name)
    assert (tmp_path / "deep/a.html").read_bytes() == (tmp_path / "deep/b.html").read_bytes()
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.html", "b.html"]


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "value.bin"
    atomic_write_bytes(path, b"old")
    with pytest.raises(KeyError):
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyError("stopped")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.txt"
    atomic_write_text(path, "old")
    program = (
        "import os, sys; from fit3d_ns.support.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert killed.returncode == -9
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.glob("*.txt")] == ["value.txt"]


def test_refused_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "file" / "report.html"))):
        Report("x").write(tmp_path / "file" / "report.html")
    with pytest.raises(UserError, match="folder"):
        (tmp_path / "folder").mkdir()
        atomic_write_text(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_json_has_no_nan_and_reads_back(tmp_path):
    data = {"rate": math.nan, "list": (1, 2.5, [math.inf, None, True]), "nested": {"name": "Küche"}}
    atomic_write_json(tmp_path / "metrics.json", data)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    expected = {"rate": None, "list": [1, 2.5, [None, None, True]], "nested": {"name": "Küche"}}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    with pytest.raises(TypeError):
        atomic_write_json(tmp_path / "metrics.json", {"bad": object()})
    assert (tmp_path / "metrics.json").read_text(encoding="utf-8") == text
