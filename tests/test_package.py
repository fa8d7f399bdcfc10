"""What is published: a wheel with every file of the packages and nothing else, a page that stands alone, licences."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from fnmatch import fnmatch
from html.parser import HTMLParser
from runpy import run_path

import markdown
import pytest
import timm
from paths import ROOT

from fit3d_ns.backbones.registry import FOCUS_NAME, NAMED_BACKBONES
from fit3d_ns.backbones.students.published import PUBLISHED_BACKBONES

PACKAGES = ("fit3d_ns", "fit3d_rooms", "fit3d_loop", "distill", "probe")
BESIDE = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "CITATION.cff")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
"""What `python -m build --no-isolation` calls."""
registry_page = run_path(str(ROOT / "setup.py"))["registry_page"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a source distribution of this tree, which also has what runs and tests leave behind."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, tree)
    for name in ("outputs/distill/config.json", "tests/test_one.py", "benchmarks/one.py", ".venv/one.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("{}")
    build("build_sdist", tree, folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    assert {path.name for path in source.iterdir()}.isdisjoint({"tests", "outputs", "benchmarks", ".venv"})
    build("build_wheel", source, folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        yield opened


def build(what, tree, into):
    command = [sys.executable, "-c", BUILD, what, str(into)]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_a_wheel_has_every_file_of_the_packages_and_no_other(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {"fit3d_loop/py.typed", "probe/data/splits/nyu_train.txt.xz", "fit3d_ns/support/report.html.jinja"} <= packed


def test_its_licences_are_those_of_the_tree(wheel):
    licences = {name.rpartition("/")[2]: wheel.read(name) for name in wheel.namelist() if "/licenses/" in name}
    assert licences == {name: (ROOT / name).read_bytes() for name in ("LICENSE", "NOTICE")}
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"


def test_its_page_leads_nowhere_beside_it(wheel):
    page = metadata(wheel)
    assert page["Description-Content-Type"] == "text/markdown"
    targets = links(page.get_payload())
    assert targets and all(target.startswith("https://") for target in targets), targets
    assert "3D-aware features for 2D vision backbones" in page.get_payload()


def test_a_repositorys_address_leads_links_and_pictures_there():
    readme = (ROOT / "README.md").read_text()
    relative = [target for target in links(readme) if "://" not in target]
    assert relative  # else nothing is tested
    page = registry_page(readme, "https://example.org/fit3d-ns/")
    ours = [target for target in links(page) if target.startswith("https://example.org/")]
    assert [target.partition("/main/")[2] for target in ours] == relative
    kinds = {target.partition("/main/")[0].rpartition("/")[2] for target in ours if target.endswith((".svg", ".jpg"))}
    assert kinds == {"raw"} and all("://" in target for target in links(page))


def links(text):
    """Targets of links and pictures of a Markdown page, in their order."""
    targets = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            targets.extend(value for name, value in attrs if name in ("href", "src"))

    Reader().feed(markdown.markdown(text, extensions=["tables", "fenced_code"]))
    return targets


def test_the_notice_names_the_licence_of_every_weight_that_is_fetched():
    rows = [line.split(maxsplit=1) for line in weight_rows()]
    licences = {name: next(text for pattern, text in rows if fnmatch(name, pattern)) for name in NAMED_BACKBONES}
    for name, backbone in NAMED_BACKBONES.items():
        expected = "mit" if name == FOCUS_NAME else timm_licence(backbone.timm_id)
        assert licences[name].lower().replace("dinov3 license", "dinov3-license").startswith(expected), name
    assert all(any(fnmatch(name, pattern) for pattern, _ in rows) for name in PUBLISHED_BACKBONES)


def timm_licence(timm_id):
    settings = timm.get_pretrained_cfg(timm_id)
    assert settings is not None
    return settings.license


def weight_rows():
    """Lines of the notice's table, one pattern of names each, the particular before the general."""
    table = (ROOT / "NOTICE").read_text().partition("\nWEIGHTS\n")[2].splitlines()
    rows = []
    for line in table:
        if line.startswith("  ") and not line.startswith("   "):
            names, _, rest = line.strip().partition("  ")
            rows += [f"{name} {rest}" for name in names.split(", ")]
    return sorted(rows, key=lambda row: "*" in row.split()[0])
