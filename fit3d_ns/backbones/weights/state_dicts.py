"""Weight files into timm's key layout: read safely, unwrapped, converted, checked key by key."""

import contextlib
import inspect
import io
import logging
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fit3d_ns.backbones.weights.transformers_layout import ANCHORS, from_transformers
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.foreign_files import what_it_is
from fit3d_ns.support.json_files import UNREADABLE, read_json
from fit3d_ns.support.tensor_files import is_finite, read_tensors
from fit3d_ns.support.torch_files import read_torch

_LOGGER = logging.getLogger(__name__)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Files that `read_state_dict` reads."""
_INDEX_SUFFIX = ".index.json"
_IN_A_FOLDER = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX_SUFFIX)
)
"""What transformers, timm and accelerate call the weights that they save to a folder."""
_WRAPPERS = ("model.", "state_dict.", "encoder.")
"""Where the weights lie in a file that also holds other copies of them, the first of these that is there."""
_PREFIXES = (*_WRAPPERS, "module.", "_orig_mod.", "backbone.")
_LEVELS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""Levels that FSDP, activation checkpointing and torch.compile put anywhere into names."""
_CHUNKS = re.compile(r"^blocks\.\d+\.(\d+)\.")
"""DINOv2's training groups blocks; the second number counts through all of them."""
_ANCHOR = "patch_embed.proj.weight"
"""A parameter that every ViT of timm and of facebookresearch has once."""
_HEADS = ("head.", "head_dist.", "attn_pool.", "fc_norm.")
"""What may stand beside the backbone: classifiers and poolers, left out where the model has none."""
_NETWORKS = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g", 4096: "7B"}


def weight_files(path: Path) -> list[Path]:
    """Lists the files that weights are in.

    Args:
        path: A weight file, an index of shards (``model.safetensors.index.json``), or a folder that transformers, timm
            or accelerate wrote.

    Returns:
        The files, an index first.

    Raises:
        UserError: If there is nothing, or a shard is missing.
    """
    if path.is_dir():
        inside = next((path / name for name in _IN_A_FOLDER if (path / name).is_file()), None)
        if inside is None:
            raise UserError(f"{path} holds no weights ({', '.join(_IN_A_FOLDER)}): check {{backbone_weights}}.")
        path = inside
    if not path.is_file():
        raise UserError(f"There is no weight file {path}: check {{backbone_weights}}.")
    if not path.name.endswith(_INDEX_SUFFIX):
        return [path]
    try:
        shards = sorted({Path(name).name for name in read_json(path)["weight_map"].values()})
    except (*UNREADABLE, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no index of shards: get it again, or check {{backbone_weights}}.") from None
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if not shards:
        raise UserError(f"{path} names no shards: get it again, or check {{backbone_weights}}.")
    if missing:
        raise UserError(
            f"{path} names {len(shards)} shards, and {', '.join(missing)} is not beside it: get the missing ones too, "
            "or check {backbone_weights}."
        )
    return [path, *(path.parent / name for name in shards)]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads tensors from weight files, running no code from them.

    Args:
        path: A .safetensors file, a .pth, .pt, .bin or .ckpt file that holds tensors and plain values alone, or what
            else `weight_files` knows.

    Returns:
        Tensors by key on the CPU, of the backbone alone: wrappers (``model``, ``teacher``), prefixes of keys
        (``module.``, ``backbone.``), levels within them, heads beside it and the state of an optimizer are left out;
        what was taken and what was left is logged. The names of `transformers` are replaced.

    Raises:
        UserError: If a file is missing, damaged, of another kind, or holds more than tensors.
    """
    files = weight_files(path)
    if len(files) == 1:
        return _unwrap(_read_file(files[0]), path)
    content: dict[str, Any] = {}
    for shard in files[1:]:
        content.update(_read_file(shard))
    return _unwrap(content, path)


def _read_file(path: Path) -> Any:
    try:
        if path.suffix in WEIGHT_SUFFIXES:
            if _is_safetensors(path):
                return read_tensors(path, checksum=False, values=False).tensors
            return read_torch(path)
    except FileNotFoundError:
        raise UserError(f"There is no weight file {path}: check {{backbone_weights}}.") from None
    except DamagedFile as error:
        if (what := what_it_is(path)) is not None:
            raise UserError(f"{path} holds no weights ({what}), or check {{backbone_weights}}.") from None
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise UserError(
                f"{path} is damaged or holds more than tensors, which is not loaded because it could run code "
                f"({error}): save its state dict alone, best as .safetensors, and pass that to {{backbone_weights}}."
            ) from None
        raise UserError(
            f"{path} is damaged or truncated ({error}): get it again, or check {{backbone_weights}}."
        ) from None
    raise UserError(
        f"{path} is no weight file that can be read: give a {', '.join(WEIGHT_SUFFIXES)} to {{backbone_weights}}."
    )


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one by its beginning, where that says what it is, else by its suffix."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        first = file.read(9)
        if first.startswith((b"PK\x03\x04", b"\x80")) and first[8:] != b"{":
            return False
        if first[8:] == b"{":
            return True
    return path.suffix == ".safetensors"


def to_timm_layout(state_dict: dict[str, Tensor], model: nn.Module, path: Path, name: str) -> dict[str, Tensor]:
    """Converts a state dict to the key layout of ``model`` and checks that it fits exactly.

    Knows timm's own layout, DINOv2's (facebookresearch: mask token, registers apart from the position embedding)
    and every other that timm's checkpoint filters know. Position embeddings of another grid are resampled, as timm
    does; classifiers and poolers that the model lacks are dropped.

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
            difference = f"has shape {tuple(found)} instead of {tuple(expected[kernel].shape)}"
            raise _misfit(state_dict, expected, path, name, kernel, difference)
    bias = "blocks.0.attn.qkv.bias"  # DINOv3's, which timm's filter drops where the model has none
    if "storage_tokens" in state_dict and "blocks.0.attn.q_bias" not in expected and _any(state_dict.get(bias)):
        raise UserError(
            f"{path} has biases of queries and values, and {name} has none: name timm's model that ends in _qkvb with "
            f"{{backbone}}."
        )
    try:
        converted = _run_timm_filter(dict(state_dict), model)
    except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError, IndexError) as error:
        _check_fit(state_dict, expected, path, name)
        raise UserError(
            f"{path} holds no weights for {name} ({type(error).__name__}: {error}): name their backbone with "
            f"{{backbone}}, or give other weights to {{backbone_weights}}."
        ) from None
    heads = [key for key in converted if key not in expected and key.startswith(_HEADS)]
    if heads:
        _LOGGER.info("%s: left out the head (%s)", path, _summary(heads))
    converted = {key: tensor for key, tensor in converted.items() if key not in heads}
    _check_fit(converted, expected, path, name)
    for key, tensor in converted.items():
        if expected[key].is_floating_point() and not (tensor.is_floating_point() and is_finite(tensor)):
            fact = "NaN or infinite values" if tensor.is_floating_point() else f"whole numbers ({tensor.dtype})"
            raise UserError(f"{path} is damaged ('{key}' holds {fact}): get it again, or check {{backbone_weights}}.")
    return {
        key: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for key, tensor in converted.items()
    }


def _any(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.any())


def _check_fit(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Raises an error that names the first difference, if there is one."""
    for key, target in expected.items():
        if key not in state_dict:
            raise _misfit(state_dict, expected, path, name, key, "is missing")
        if state_dict[key].shape != target.shape:
            found, wanted = tuple(state_dict[key].shape), tuple(target.shape)
            raise _misfit(state_dict, expected, path, name, key, f"has shape {found} instead of {wanted}")
    for key in state_dict:
        if key not in expected:
            raise _misfit(state_dict, expected, path, name, key, "is there but unknown to it")


def _misfit(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    path: Path,
    name: str,
    key: str,
    difference: str,
) -> UserError:
    """The sentence for weights that do not fit: another architecture where shapes say so, else the names alone."""
    advice = "name their backbone with {backbone}, or give other weights to {backbone_weights}."
    found, wanted = _facts(state_dict), _facts(expected)
    if found is None:
        return UserError(
            f"{path} holds no vision transformer in a layout known here (timm's, DINOv2's, DINOv3's, OpenCLIP's, "
            f"transformers'); its tensors are {_summary(state_dict)}: {advice}"
        )
    if found == wanted and "shape" not in difference:
        return UserError(f"{path} holds {found}, as {name} is, but '{key}' {difference}: {advice}")
    return UserError(
        f"{path} holds weights of another architecture than {name}: it is {found}, and {name} is {wanted or 'no ViT'} "
        f"('{key}' {difference}); {advice}"
    )


def _facts(state_dict: Mapping[str, Tensor]) -> str | None:
    """Says what vision transformer tensors are of: width, patch, depth and registers; None if of none."""
    kernel = state_dict.get(_ANCHOR)
    if kernel is None or kernel.dim() < 2:
        return None
    width = len(kernel)
    depth = len({match[1] for key in state_dict if (match := re.match(r"blocks\.(\d+)\.", key))})
    patch = f"/{kernel.shape[-1]}" if kernel.dim() == 4 else ""
    registers = next(
        (state_dict[key] for key in ("reg_token", "register_tokens", "storage_tokens") if key in state_dict), None
    )
    count = 0 if registers is None or registers.dim() < 2 else registers.shape[-2]
    named = f"a ViT-{_NETWORKS[width]}{patch}" if width in _NETWORKS else f"a ViT{patch}"
    return f"{named} of width {width} with {depth} blocks and {count or 'no'} registers"


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Finds the backbone by its patch embedding, however its tensors are grouped and whatever lies beside it."""
    tensors = {_LEVELS.sub("", name): value for name, value in _tensors(content)}
    if not tensors:
        raise UserError(f"{path} holds no state dict of tensors: give weights of the backbone to {{backbone_weights}}.")
    found = {_root(name, anchor): anchor for name in tensors for anchor in (_ANCHOR, *ANCHORS) if _ends(name, anchor)}
    roots = list(found)
    if len(roots) > 1:  # such as copies of the weights averaged over training
        roots = next((some for wrapper in _WRAPPERS if (some := [r for r in roots if r.startswith(wrapper)])), roots)
    if len(roots) > 1:
        raise UserError(
            f"{path} holds {len(roots)} backbones ({', '.join(roots)}): save one of them alone and give it to "
            f"{{backbone_weights}}."
        )
    if not roots:
        # Another layout, which timm's filters may know: only what all names share is taken off.
        while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        return tensors
    root = roots[0]
    left = [name for name in tensors if not name.startswith(root)]
    backbone = {name.removeprefix(root): value for name, value in tensors.items() if name.startswith(root)}
    if found[root] == _ANCHOR:
        backbone = {_CHUNKS.sub(r"blocks.\1.", name): value for name, value in backbone.items()}
    else:
        backbone, unknown = from_transformers(backbone)
        left += [root + name for name in unknown]
    if root or left:
        _LOGGER.info("%s: took the backbone %s, left out %s", path, root.rstrip("."), _summary(left) or "nothing")
    return backbone


def _ends(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _root(name: str, anchor: str) -> str:
    return name[: len(name) - len(anchor)]


def _summary(names: Iterable[str]) -> str:
    """Names tensors by where they lie: the first three places, and how many tensors there are."""
    places = Counter(".".join(name.split(".")[:2]) if name.count(".") > 1 else name for name in names)
    listed = ", ".join(list(places)[:3])
    return f"{listed} and more, {places.total()} tensors" if len(places) > 3 else listed


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
    with contextlib.redirect_stdout(io.StringIO()):  # a filter of timm prints what it expects to go wrong
        return convert(state_dict, model, **options)
