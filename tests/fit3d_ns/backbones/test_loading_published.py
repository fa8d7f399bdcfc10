"""FiT3D's published weights, addresses, and torch.hub."""

import hashlib
import io
import subprocess
import sys
import urllib.error
from email.message import Message
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from paths import ROOT
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from fit3d_ns.backbones import PUBLISHED_BACKBONES, BackboneSpec, describe_backbone, load
from fit3d_ns.backbones.architecture import resolve_architecture, skeleton
from fit3d_ns.backbones.students import fine_tuned as fine_tuned_module
from fit3d_ns.backbones.students.published import PUBLISHED_REVISION
from fit3d_ns.backbones.weights.state_dicts import to_timm_layout
from fit3d_ns.support.errors import UserError

TINY = "test_vit"
pytestmark = pytest.mark.usefixtures("own_cache")

# timm id and width as in the paper's repository; size of the published file in bytes.
PAPER = {
    "dinov2_small_fine": ("vit_small_patch14_dinov2.lvd142m", 384, 88278421),
    "dinov2_base_fine": ("vit_base_patch14_dinov2.lvd142m", 768, 346372960),
    "dinov2_reg_small_fine": ("vit_small_patch14_reg4_dinov2.lvd142m", 384, 88283296),
    "clip_base_fine": ("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", 768, 344411672),
    "mae_base_fine": ("vit_base_patch16_224.mae", 768, 343240909),
    "deit3_base_fine": ("deit3_base_patch16_224.fb_in1k", 768, 343318933),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Any]:
    """A bare state dict of DINOv2-S, as the paper's files are, and the model that it came from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    path = tmp_path_factory.mktemp("published") / "dinov2_small_finetuned.pth"
    torch.save(model.state_dict(), path)
    return path, model


@pytest.fixture
def serve(monkeypatch):
    """Answers torch.hub's requests; returns the addresses asked for."""

    def start(content: bytes | Exception) -> list[str]:
        asked = []

        class Response(io.BytesIO):
            def info(self):
                return Message()

        def answer(request, *_, **__):
            asked.append(request.full_url)
            if isinstance(content, Exception):
                raise content
            return Response(content)

        monkeypatch.setattr("torch.hub.urlopen", answer)
        return asked

    return start


@pytest.mark.parametrize("name", PAPER)
def test_each_published_file_fits_its_architecture(name):
    timm_id, width, num_bytes = PAPER[name]
    published = PUBLISHED_BACKBONES[name]
    info = describe_backbone(BackboneSpec(published.original))
    assert (info.timm_id, info.width, info.layer) == (timm_id, width, 11)
    # The architecture's tensors have the size of the published file but for what a zip archive adds per tensor.
    expected = skeleton(resolve_architecture(published.original)).state_dict()
    overhead = num_bytes - sum(4 * tensor.numel() for tensor in expected.values())
    assert 250 < overhead / len(expected) < 350
    # As the paper's code builds it.
    plain = timm.create_model(timm_id.partition(".")[0], num_classes=0, dynamic_img_size=True)
    assert to_timm_layout(dict(plain.state_dict()), plain, Path("x.pth"), name).keys() == expected.keys()


def test_hub_entries_are_the_papers_and_ours():
    spec = util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    assert spec is not None and spec.loader is not None
    hubconf = util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    entries = {name for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith("_")}
    assert entries == {*PAPER, "load"} and set(PUBLISHED_BACKBONES) == set(PAPER)
    assert "timm" in hubconf.dependencies
    for name in PAPER:
        with pytest.raises(UserError, match="There is no weight file nothing.pth: check weights="):
            getattr(hubconf, name)(weights="nothing.pth")


def test_torch_hub_loads_the_papers_model_from_a_file(small, teacher_weights):
    path, model = small
    loaded = torch.hub.load(str(ROOT), "dinov2_small_fine", source="local", weights=str(path))
    assert isinstance(loaded, VisionTransformer) and not loaded.training
    images = torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    with pytest.raises(
        UserError, match=r"dinov2_small_finetuned.pth holds weights of another arch.*'reg_token' is miss"
    ):
        torch.hub.load(str(ROOT), "dinov2_reg_small_fine", source="local", weights=str(path))
    with pytest.raises(
        UserError, match="tiny.safetensors .*'patch_embed.proj.weight' has shape .*, or give other weigh"
    ):
        torch.hub.load(str(ROOT), "mae_base_fine", source="local", weights=str(teacher_weights))


def test_a_clone_is_enough_and_so_are_torch_and_timm(small, teacher_weights, tmp_path):
    """Run elsewhere, with everything else that the project uses made impossible to import."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("hubconf.py", "fit3d_ns"):
        (clone / name).symlink_to(ROOT / name)
    program = f"""
import sys
absent = ("nerfstudio", "gsplat", "jaxtyping", "numba", "open3d", "matplotlib", "tyro", "scipy", "torchmetrics",
          "rich", "onnx", "cv2", "distill", "probe")
sys.modules.update(dict.fromkeys(absent))  # None: import finds no such module
import torch
model = torch.hub.load({str(clone)!r}, "dinov2_small_fine", source="local", weights={str(small[0])!r})
module = torch.hub.load({str(clone)!r}, "load", {TINY!r}, "duplicate", source="local",
                        backbone_weights={str(teacher_weights)!r})
print(type(model).__name__, tuple(module(torch.rand(1, 3, 40, 50)).shape))
import fit3d_ns
assert fit3d_ns.__file__.startswith({str(clone)!r}), fit3d_ns.__file__
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "VisionTransformer (1, 128, 3, 3)"


def test_published_names_give_original_and_tuned_on_imagenets_colours(small, no_network, fill_hub_cache, monkeypatch):
    with pytest.raises(UserError) as error:
        load("dinov2_small_fine")
    message = str(error.value)
    assert "download dinov2_small_finetuned.pth from the Hugging Face repository yuanwenyue/FiT3D" in message
    assert "\n" not in message and no_network
    path, model = small
    fill_hub_cache("yuanwenyue/FiT3D", {path.name: path}, PUBLISHED_REVISION)
    with pytest.raises(
        UserError, match="not the file that was published as dinov2_small_fine .its hash differs.: dele"
    ):
        load("dinov2_small_fine", "tuned")
    monkeypatch.setattr(fine_tuned_module, "hash_matches", lambda *_: True)
    backbone = load("dinov2_small_fine", backbone_weights=path)
    images = torch.rand(1, 3, 28, 42)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        tokens = model.forward_features((images - mean) / std)[:, 1:].transpose(1, 2).reshape(1, 384, 2, 3)
        torch.testing.assert_close(backbone(images), torch.cat([tokens, tokens], 1), rtol=1e-4, atol=1e-4)


def test_clip_is_read_with_the_colours_that_it_was_fine_tuned_with(fill_hub_cache, monkeypatch, tmp_path):
    """Timm's own for this model are CLIP's; FiT3D took ImageNet's for all."""
    (tmp_path / "clip_base_finetuned.pth").write_bytes(b"")
    fill_hub_cache(
        "yuanwenyue/FiT3D", {"clip_base_finetuned.pth": tmp_path / "clip_base_finetuned.pth"}, PUBLISHED_REVISION
    )
    monkeypatch.setattr(fine_tuned_module, "hash_matches", lambda *_: True)
    original = fine_tuned_module.find_fine_tuned("clip_base_fine", "x").original
    assert original is not None
    assert (
        describe_backbone(original).mean == (0.485, 0.456, 0.406) != describe_backbone(BackboneSpec("clip_base")).mean
    )


def test_addresses_are_downloaded_once_and_checked(teacher_weights, serve):
    content = teacher_weights.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    asked = serve(content)
    url = "https://example.org/weights/tuned.safetensors"
    for address in (url, url, f"{url}#sha256={sha256}", f"{url}#sha256={sha256}"):
        state_dict = load(address, "tuned", backbone=TINY).state_dict()
        assert torch.equal(state_dict["tuned.model.norm.weight"], load_file(teacher_weights)["norm.weight"])
    assert asked == [url, url]
    with pytest.raises(UserError, match="could not be downloaded .*invalid hash value"):
        load(f"{url}#sha256={'0' * 64}", "tuned", backbone=TINY)


@pytest.mark.parametrize(
    ("url", "content", "said"),
    [
        ("http://example.org/tuned.pth", b"", "is no https address"),
        ("file:///etc/tuned.pth", b"", "is no https address"),
        ("https://example.org/page", b"", "is no address of a weight file"),
        ("https://example.org/tuned.pth", b"<!doctype html>", "no weight file, or not all of it"),
        ("https://example.org/cut.safetensors", b"\x40\0\0\0\0\0\0\0{", "no weight file, or not all of it"),
        ("https://example.org/tuned.pth", urllib.error.URLError("no route"), "could not be downloaded .*no route"),
    ],
)
def test_addresses_that_give_no_weights(url, content, said, serve, tmp_path):
    asked = serve(content)
    with pytest.raises(UserError, match=said) as error:
        load(url, "tuned", backbone=TINY)
    assert url in str(error.value) and "\n" not in str(error.value)
    assert bool(asked) == (said not in ("is no https address", "is no address of a weight file"))
    assert not list((tmp_path / "user-cache").rglob("*.*"))
