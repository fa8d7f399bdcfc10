"""What makes features what they are: a JSON-able identity, and the hash of weights within it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.backbones.architecture import describe_backbone, resolve_architecture, skeleton
from fit3d_ns.backbones.spec import BackboneInfo, BackboneSpec
from fit3d_ns.backbones.weights.finding import find_weights
from fit3d_ns.backbones.weights.state_dicts import read_state_dict, to_timm_layout, weight_files
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import user_cache_directory
from fit3d_ns.support.json_files import UNREADABLE, build, read_record, write_record

IDENTITY_SCHEMA = 1
"""Raise it when the same choice of a backbone comes to give other features."""
_LARGEST = 2**16
"""Channels, pixels of a patch or layers of any backbone."""


def hash_state_dict(state_dict: Mapping[str, Tensor]) -> str:
    """Hashes tensors by content: sorted names, dtypes, shapes and bytes, whatever file or device they came from.

    Args:
        state_dict: Tensors by name.

    Returns:
        SHA-256, hexadecimal.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def backbone_identity(spec: BackboneSpec) -> dict[str, Any]:
    """Returns what `load_backbone(spec, ...).identity` would be, without building the model.

    The hash of a weight file's tensors is remembered in the user's cache by path, size and time of change, so that
    a warm start reads no weights.

    Args:
        spec: The user's choice.

    Returns:
        JSON-able, equal for equal features.

    Raises:
        UserError: As `load_backbone`.
    """
    info = describe_backbone(spec)
    path = find_weights(spec)
    note = _hash_note(path, info)
    remembered = _read_note(note)
    if remembered is None:
        remembered = hash_state_dict(load_weights(spec, path))
        _write_note(note, remembered)
    return make_identity(spec, info, remembered)


def make_identity(spec: BackboneSpec, info: BackboneInfo, weights_sha256: str) -> dict[str, Any]:
    """Assembles the identity of a backbone whose weights hash is known.

    Args:
        spec: The user's choices.
        info: What `describe_backbone` says of them.
        weights_sha256: Of `hash_state_dict`, hexadecimal.

    Returns:
        JSON-able; equal identities give equal features.
    """
    return {
        "schema": IDENTITY_SCHEMA,
        "norm": spec.norm,
        "weights_sha256": weights_sha256,
        "timm_major": int(metadata.version("timm").split(".")[0]),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(info).items()},
    }


@dataclass(frozen=True)
class _Identity(BackboneInfo):
    """An identity's fields, for `check_identity`."""

    schema: int
    norm: bool
    weights_sha256: str
    timm_major: int

    def __post_init__(self) -> None:
        if self.schema != IDENTITY_SCHEMA:
            raise ValueError(f"schema is {self.schema}, this version reads {IDENTITY_SCHEMA}")
        for name in ("width", "patch_size", "num_layers"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} is {getattr(self, name)}, not from 1 to {_LARGEST}")
        if not 0 <= self.layer < self.num_layers:
            raise ValueError(f"layer is {self.layer}, not one of {self.num_layers}")
        if not re.fullmatch("[0-9a-f]{64}", self.weights_sha256):
            raise ValueError(f"weights_sha256 is {self.weights_sha256[:80]!r}, no SHA-256")
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}, not positive")


def check_identity(identity: Any, name: str) -> dict[str, Any]:
    """Checks what a file says that a backbone is, field by field.

    Args:
        identity: See `make_identity`; read from JSON or a checkpoint.
        name: Of the entry, for the sentence.

    Returns:
        ``identity`` itself.

    Raises:
        DamagedFile: Naming the field that is missing, unknown, of another type or out of range.
    """
    build(_Identity, identity, name)
    return identity


def spec_of_identity(identity: Mapping[str, Any], weights: Path | None = None) -> BackboneSpec:
    """Returns the choice that an identity came from.

    Args:
        identity: See `make_identity`; of a bundle's teacher, or of a card.
        weights: The weight file, which an identity does not name.

    Raises:
        UserError: As `describe_backbone`.
    """
    own = describe_backbone(BackboneSpec(identity["name"]))
    normalization = "own" if list(own.mean) == list(identity["mean"]) else "imagenet"
    return BackboneSpec(identity["name"], weights, identity["layer"], identity["norm"], normalization)


def load_weights(spec: BackboneSpec, path: Path) -> dict[str, Tensor]:
    """Reads a weight file into the layout of the backbone's timm model; errors as `to_timm_layout`.

    Args:
        spec: Names the architecture.
        path: A weight file, or a folder of shards.

    Returns:
        Weights by timm's keys.
    """
    architecture = resolve_architecture(spec.name)
    return to_timm_layout(read_state_dict(path), skeleton(architecture), path, architecture.name)


@dataclass(frozen=True)
class _Note:
    """What is remembered of a weight file."""

    weights_sha256: str


def _hash_note(path: Path, info: BackboneInfo) -> Path | None:
    """Returns where the hash of these very files for this very architecture is remembered."""
    try:
        files = [(file, file.stat()) for file in weight_files(path)]
    except (OSError, UserError):
        return None
    # The hash is of converted tensors, so what converts them counts too.
    facts = [IDENTITY_SCHEMA, metadata.version("timm"), info.timm_id, info.num_layers]
    for file, status in files:
        facts += [str(file.resolve()), status.st_size, status.st_mtime_ns]
    key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    return user_cache_directory() / "weight-hashes" / f"{key}.json"


def _read_note(note: Path | None) -> str | None:
    try:
        return build(_Note, read_record(note)).weights_sha256 if note else None
    except UNREADABLE:
        return None


def _write_note(note: Path | None, weights_sha256: str) -> None:
    try:
        if note:
            write_record(note, asdict(_Note(weights_sha256)))
    except UserError:
        pass  # A cache that cannot be written to costs the next start a second, nothing else.
