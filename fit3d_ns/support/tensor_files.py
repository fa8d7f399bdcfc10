"""Safetensors files of our own: written with a checksum of their data, checked when they are opened.

The checksum (CRC-32 of names, types, shapes, bytes and the other metadata) stands in the header's metadata. It finds
what disks, networks and half-finished copies do to a file; it is no protection against a forger.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.support.errors import DamagedFile, first_line
from fit3d_ns.support.files import atomic_path

_CHECKSUM = "crc32"
_OS_ERROR = re.compile(r"os error (\d+)")
"""In what safetensors says when the operating system refuses."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a file must be."""

    dtype: torch.dtype | tuple[torch.dtype, ...]
    """Its type, or those that it may have."""
    shape: tuple[int | str, ...]
    """Its lengths; a name stands for any length from 1 on, the same one wherever the name stands."""


@dataclass(frozen=True)
class TensorFile:
    """What was found in a file."""

    tensors: dict[str, Tensor]
    """By name, memory-mapped: pages are read when touched, writing to one changes no file."""
    metadata: dict[str, str]
    """Texts that were stored with them."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, sync: bool = True
) -> None:
    """Writes tensors and a checksum of them, as one step.

    Args:
        path: Where the file is to stand.
        tensors: By name, of any device.
        metadata: Texts to store with them.
        sync: Whether the file must survive a power failure from now on; not needed for caches, which the checksum
            guards. See `fit3d_ns.support.files.atomic_path`.

    Raises:
        UserError: If the operating system refuses.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = dict(metadata or {})
    with atomic_path(path, sync=sync) as temporary:
        try:
            save_file(stored, temporary, {**texts, _CHECKSUM: _checksum(stored, texts)})
        except SafetensorError as error:
            refused = _OS_ERROR.search(str(error))
            if refused is None:
                raise
            raise OSError(int(refused[1]), os.strerror(int(refused[1]))) from error


def read_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec] | None = None,
    optional: Mapping[str, TensorSpec] | None = None,
    checksum: bool = True,
    values: bool = True,
) -> TensorFile:
    """Opens a file that `write_tensors` wrote and checks it.

    Args:
        path: The file.
        specs: Every tensor that must be in it; None: whatever is in it.
        optional: Tensors that may be in it beside those.
        checksum: Whether it must carry a checksum; if not, one that is there is compared all the same.
        values: Whether all data are read, for the checksum and for NaN and infinity; if not, the header alone is
            checked.

    Returns:
        Its tensors and texts.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: If it cannot be read, or names, types, shapes, checksum are not what they should be, or a value is
            NaN or infinite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
        if not os.path.lexists(path):
            raise FileNotFoundError(path) from error
        raise DamagedFile(_reason(path, error)) from error
    stored = metadata.pop(_CHECKSUM, None)
    if stored is None and checksum:
        raise DamagedFile("it carries no checksum")
    if specs is not None:
        _compare(tensors, specs, optional or {})
    if values:
        if stored is not None and stored != _checksum(tensors, metadata):
            raise DamagedFile("its checksum differs from its data")
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise DamagedFile(f"{name} holds NaN or infinite values")
    return TensorFile(tensors, metadata)


def is_finite(tensor: Tensor) -> bool:
    """Returns whether no value is NaN or infinite.

    Args:
        tensor: Of any type and shape; one on the meta device has no values.
    """
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    # NaN and infinity show in the extremes, which take a tenth of the time of isfinite.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _reason(path: Path, error: Exception) -> str:
    if path.is_symlink() and not path.is_file():
        return "it is a link that leads to no file"
    if path.is_dir():
        return "it is a folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"it is no safetensors file, or not all of it: {first_line(error)}"


def _compare(
    tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], optional: Mapping[str, TensorSpec]
) -> None:
    missing, unknown = [*(specs.keys() - tensors.keys())], [*(tensors.keys() - specs.keys() - optional.keys())]
    if missing:
        raise DamagedFile(f"it lacks {min(missing)}")
    if unknown:
        raise DamagedFile(f"it holds {min(unknown)}, which does not belong there")
    lengths: dict[str, int] = {}
    for name, spec in {**specs, **optional}.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        allowed = spec.dtype if isinstance(spec.dtype, tuple) else (spec.dtype,)
        if tensor.dtype not in allowed:
            raise DamagedFile(f"{name} is of type {_word(tensor.dtype)} instead of {_word(allowed[0])}")
        found = tuple(tensor.shape)
        wanted = tuple(length if isinstance(length, int) else lengths.get(length, length) for length in spec.shape)
        fits = len(found) == len(wanted) and all(
            length >= 1 if isinstance(want, str) else length == want for length, want in zip(found, wanted)
        )
        if not fits:
            shown = " x ".join(map(str, wanted))
            raise DamagedFile(f"{name} has the shape {' x '.join(map(str, found)) or 'of a number'} instead of {shown}")
        lengths |= {key: length for key, length in zip(spec.shape, found) if isinstance(key, str)}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name}|{_word(tensor.dtype)}|{tuple(tensor.shape)}|".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    for key in sorted(metadata):
        value = zlib.crc32(f"{key}={metadata[key]}|".encode(), value)
    return f"{value:08x}"
