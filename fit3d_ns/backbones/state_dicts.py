"""Weight files into timm's key layout: read safely, unwrapped, converted, checked key by key."""

import inspect
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fit3d_ns.support.command_line import BACKBONE_FLAG, WEIGHTS_FLAG
from fit3d_ns.support.errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Files that `read_state_dict` reads."""
_WRAPPERS = ("model.", "state_dict.", "encoder.")
"""Where the weights lie in a file that also holds other copies of them, the first of these that is there."""
_PREFIXES = (*_WRAPPERS, "module.", "_orig_mod.", "backbone.")
_ANCHOR = "patch_embed.proj.weight"
"""A parameter that every ViT of timm and of facebookresearch has once."""
_CLASSIFIERS = ("head.", "head_dist.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads tensors from a weight file, running no code from it.

    Args:
        path: A .safetensors file, or a .pth, .pt, .bin or .ckpt file that holds tensors and plain values alone.

    Returns:
        Tensors by key on the CPU, of the backbone alone: wrappers (``model``, ``teacher``), prefixes of keys
        (``module.``, ``backbone.``), heads beside it and the state of an optimizer are left out.

    Raises:
        UserError: If the file is missing, damaged, of another kind, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"There is no weight file {path}: check {WEIGHTS_FLAG}.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        elif path.suffix in WEIGHT_SUFFIXES:
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UserError(
                f"{path} is no weight file that can be read: give a {', '.join(WEIGHT_SUFFIXES)} to {WEIGHTS_FLAG}."
            )
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is damaged or holds more than tensors, which is not loaded because it could run code: "
            f"save its state dict alone, best as .safetensors, and pass that to {WEIGHTS_FLAG}."
        ) from None
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or truncated: get it again, or check {WEIGHTS_FLAG}.") from None
    return _unwrap(content, path)


def to_timm_layout(state_dict: dict[str, Tensor], model: nn.Module, path: Path, name: str) -> dict[str, Tensor]:
    """Converts a state dict to the key layout of ``model`` and checks that it fits exactly.

    Knows timm's own layout, DINOv2's (facebookresearch: mask token, registers apart from the position embedding)
    and every other that timm's checkpoint filters know. Position embeddings of another grid are resampled, as timm
    does; classifier weights are dropped.

    Args:
        state_dict: See `read_state_dict`; left as it is.
        model: The timm model, or its skeleton on the meta device.
        path: Where the tensors came from, for the error.
        name: The backbone's name, for the error.

    Returns:
        Tensors for ``model.load_state_dict(..., strict=True)``; floating-point ones in float32.

    Raises:
        UserError: If a key is missing or unknown, or a shape differs: the first difference is named.
    """
    expected = model.state_dict()
    kernel = "patch_embed.proj.weight"
    if kernel in state_dict and kernel in expected:
        # timm would silently resample another patch size.
        found = state_dict[kernel].shape
        if len(found) == 4 and found != expected[kernel].shape:
            raise _misfit(path, name, kernel, f"has shape {tuple(found)} instead of {tuple(expected[kernel].shape)}")
    try:
        converted = _run_timm_filter(dict(state_dict), model)
    except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError, IndexError) as error:
        _check_fit(state_dict, expected, path, name)
        raise UserError(
            f"{path} holds no weights for {name} ({type(error).__name__}: {error}): name their backbone with "
            f"{BACKBONE_FLAG}, or give other weights to {WEIGHTS_FLAG}."
        ) from None
    converted = {
        key: tensor for key, tensor in converted.items() if key in expected or not key.startswith(_CLASSIFIERS)
    }
    _check_fit(converted, expected, path, name)
    return {
        key: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for key, tensor in converted.items()
    }


def _check_fit(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Raises an error that names the first difference, if there is one."""
    for key, target in expected.items():
        if key not in state_dict:
            raise _misfit(path, name, key, "is missing")
        if state_dict[key].shape != target.shape:
            found, wanted = tuple(state_dict[key].shape), tuple(target.shape)
            raise _misfit(path, name, key, f"has shape {found} instead of {wanted}")
    for key in state_dict:
        if key not in expected:
            raise _misfit(path, name, key, "is there but unknown to it")


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Finds the backbone by its patch embedding, however its tensors are grouped and whatever lies beside it."""
    tensors = dict(_tensors(content))
    if not tensors:
        raise UserError(f"{path} holds no state dict of tensors: give weights of the backbone to {WEIGHTS_FLAG}.")
    roots = [name.removesuffix(_ANCHOR) for name in tensors if name.endswith(_ANCHOR)]
    if len(roots) > 1:  # such as copies of the weights averaged over training
        roots = next((found for wrapper in _WRAPPERS if (found := [r for r in roots if r.startswith(wrapper)])), roots)
    if len(roots) > 1:
        raise UserError(
            f"{path} holds {len(roots)} backbones ({', '.join(roots)}): save one of them alone and give it to "
            f"{WEIGHTS_FLAG}."
        )
    if roots:
        return {name.removeprefix(roots[0]): value for name, value in tensors.items() if name.startswith(roots[0])}
    # Another layout, which timm's filters may know: only what all names share is taken off.
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of nested mappings under their joined names."""
    if isinstance(content, Tensor) and prefix:
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))


def _run_timm_filter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    # timm keeps each family's conversion beside its class.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state_dict
    if "register_tokens" in state_dict:
        # timm tells DINOv2's layout by its mask token, which is of no use otherwise and sometimes left out.
        state_dict.setdefault("mask_token", torch.empty(0))
    options = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        options["adapt_layer_scale"] = any(".gamma_" in key for key in state_dict)
    return convert(state_dict, model, **options)


def _misfit(path: Path, name: str, key: str, difference: str) -> UserError:
    return UserError(
        f"{path} holds weights of another architecture than {name} ('{key}' {difference}): name their backbone with "
        f"{BACKBONE_FLAG}, or give other weights to {WEIGHTS_FLAG}."
    )
