"""A result in the formats of other programs: timm's config.json, DINOv2's keys, transformers' folder, ONNX."""

import copy
import json
import logging
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fit3d_ns.backbones.architecture import build_model, resolve_architecture, skeleton
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_path, atomic_write_json
from fit3d_ns.support.json_files import read_json

CONFIG_NAME = "config.json"
"""By which timm opens the folder."""
_ONNX_LIMIT = 2**31 - 2**20
"""Bytes of weights that fit into one file beside the graph."""
_HEAD_WIDTH = 64
"""Channels of an attention head in every DINOv2."""


def write_timm_config(folder: Path, identity: Mapping[str, Any], weights_name: str) -> Path:
    """Writes what ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads, and ``hf-hub:`` once uploaded.

    timm finds a folder's weights by their suffix, the first by name, and those on the hub by the name in here.

    Args:
        folder: Of the result.
        identity: Of the original, see `make_identity`: architecture, mean and std.
        weights_name: File of the weights in timm's layout.

    Returns:
        The file written.

    Raises:
        UserError: If the disk refuses.
    """
    from timm.models._hub import save_config_for_hf

    architecture = resolve_architecture(identity["name"])
    model: Any = copy.copy(skeleton(architecture))
    unset = ("hf_hub_id", "url", "file", "source", "hf_hub_filename")
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in unset} | {
        "mean": tuple(identity["mean"]),
        "std": tuple(identity["std"]),
        "num_classes": 0,
        "custom_load": False,
    }
    options: dict[str, Any] = {"dynamic_img_size": True}
    if architecture.depth is not None:
        options["depth"] = architecture.depth
    with atomic_path(folder / CONFIG_NAME) as temporary:
        path: Any = temporary  # the type that timm names is str; older versions need a Path
        save_config_for_hf(model, path, model_args=options)
        config = read_json(temporary)
        config["pretrained_cfg"]["hf_hub_filename"] = weights_name  # timm leaves out where weights come from
        temporary.write_text(json.dumps(config, indent=2))
    return folder / CONFIG_NAME


def check_dinov2(timm_id: str, flag: str = "--dinov2-layout") -> None:
    """Refuses backbones that facebookresearch/dinov2 does not have.

    Args:
        timm_id: The architecture and weights tag, as timm names them.
        flag: What asked for its layout.

    Raises:
        UserError: If ``timm_id`` is none of them.
    """
    if "dinov2" not in timm_id:
        raise UserError(f"{flag} is for DINOv2 backbones, and {timm_id} is none: leave it out.")


def check_onnx() -> None:
    """Checks that what torch needs to write ONNX is installed.

    Raises:
        UserError: If it is not.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {' and '.join(missing)}: run `pip install onnx onnxscript`, or leave it out.")


def to_dinov2_layout(weights: Mapping[str, Tensor], timm_id: str) -> dict[str, Tensor]:
    """Converts timm's keys of a DINOv2 to those of facebookresearch/dinov2.

    With registers, timm folds the class token's position embedding into the token; it is given back as zero, which
    is the same sum.

    Args:
        weights: timm's state dict.
        timm_id: The architecture.

    Returns:
        Tensors that Meta's ``vit_*`` modules load with ``strict=True``.

    Raises:
        UserError: If the backbone is no DINOv2.
    """
    check_dinov2(timm_id)
    converted = dict(weights)
    width = converted["cls_token"].shape[-1]
    if "reg_token" in converted:
        converted["register_tokens"] = converted.pop("reg_token")
        positions = converted["pos_embed"]  # [1, h * w, C]
        converted["pos_embed"] = torch.cat([positions.new_zeros(1, 1, width), positions], dim=1)
    converted["mask_token"] = converted["cls_token"].new_zeros(1, width)
    if "giant" in timm_id:  # SwiGLU
        renames = ((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
        for pattern, replacement in renames:
            converted = {re.sub(pattern, replacement, name): tensor for name, tensor in converted.items()}
    return converted


_TRANSFORMERS_NAMES = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)


def write_transformers(folder: Path, weights: Mapping[str, Tensor], identity: Mapping[str, Any]) -> list[Path]:
    """Writes a folder that ``transformers.AutoModel.from_pretrained`` opens; `transformers` is not needed for it.

    Args:
        folder: Where it goes; made if it does not exist.
        weights: timm's state dict of a DINOv2, fp32.
        identity: Of the original, see `make_identity`.

    Returns:
        The files written.

    Raises:
        UserError: If the backbone is no DINOv2, or the disk refuses.
    """
    check_dinov2(identity["timm_id"], "--transformers-layout")
    converted: dict[str, Tensor] = {}
    for name, tensor in to_dinov2_layout(weights, identity["timm_id"]).items():
        for pattern, replacement in _TRANSFORMERS_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for which, part in zip(("query", "key", "value"), tensor.chunk(3)):
                converted[name.replace(".attn.qkv.", f".attention.attention.{which}.")] = part
        else:
            converted[name] = tensor
    positions, patch = converted["embeddings.position_embeddings"], identity["patch_size"]
    registers = converted.get("embeddings.register_tokens")
    width, first = identity["width"], "encoder.layer.0.mlp"
    gated = f"{first}.weights_in.weight" in converted
    config: dict[str, Any] = {
        "model_type": "dinov2" if registers is None else "dinov2_with_registers",
        "architectures": ["Dinov2Model" if registers is None else "Dinov2WithRegistersModel"],
        "hidden_size": width,
        "num_hidden_layers": identity["num_layers"],
        "num_attention_heads": width // _HEAD_WIDTH,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": round((positions.shape[1] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
        "use_swiglu_ffn": gated,
        "torch_dtype": "float32",
    }
    if registers is not None:
        config["num_register_tokens"] = registers.shape[1]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "model.safetensors") as temporary:
        tensors = {name: tensor.contiguous() for name, tensor in converted.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    size = {"height": config["image_size"], "width": config["image_size"]}
    preprocessor = {"image_processor_type": "BitImageProcessor", "do_center_crop": False, "do_resize": True}
    preprocessor |= {"size": size, "resample": 3, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
    preprocessor |= {"image_mean": list(identity["mean"]), "image_std": list(identity["std"])}
    atomic_write_json(folder / "preprocessor_config.json", preprocessor)
    atomic_write_json(folder / "config.json", config)
    return sorted(folder.iterdir())


class _DenseGraph(nn.Module):
    """Images in [0, 1] to patch tokens, without the checks of `Backbone` that would fix the size in the graph."""

    def __init__(self, model: nn.Module, identity: Mapping[str, Any]) -> None:
        super().__init__()
        self._model: Any = model
        self._layer, self._norm = identity["layer"], identity["norm"]
        self.register_buffer("mean", torch.tensor(identity["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(identity["std"]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Computes [B, C, H / patch, W / patch]."""
        return self._model.forward_intermediates(
            (images - self.mean) / self.std,  # type: ignore[operator]
            indices=[self._layer],
            norm=self._norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )[0]


def write_onnx(path: Path, weights: Mapping[str, Tensor], identity: Mapping[str, Any]) -> Path:
    """Writes a graph from ``images`` [B, 3, H, W], RGB in [0, 1], to ``patch_tokens`` [B, C, H / patch, W / patch].

    B, H and W are chosen when it is run; H and W are multiples of the patch size.

    Args:
        path: The file.
        weights: timm's state dict, fp32.
        identity: Of the original, see `make_identity`: architecture, layer, norm, mean and std.

    Returns:
        The file.

    Raises:
        UserError: If torch cannot write ONNX here, or the disk refuses.
    """
    check_onnx()
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > _ONNX_LIMIT:
        raise UserError(f"{identity['name']} is larger than the 2 GB that an ONNX file may have: leave --onnx out.")
    model = build_model(resolve_architecture(identity["name"]), "cpu")
    model.load_state_dict(dict(weights), strict=True)
    graph, patch = _DenseGraph(model, identity).eval().requires_grad_(False), identity["patch_size"]
    free = torch.export.Dim.DYNAMIC
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph,
            (torch.zeros(2, 3, 4 * patch, 5 * patch),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["patch_tokens"],
            dynamic_shapes={"images": {0: free, 2: free, 3: free}},
        )
    except Exception as error:  # whatever torch's exporter raises for a backbone that it cannot trace
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"torch cannot write {identity['name']} as ONNX ({reason}): leave --onnx out.") from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    assert program is not None
    with atomic_path(path) as temporary:
        program.save(str(temporary))
    return path
