"""Fine-tuned backbones: the one place that knows what a result of fit3d-distill looks like and reads any of them."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import torch

from fit3d_ns.backbones.architecture import describe_backbone
from fit3d_ns.backbones.assembly import ASSEMBLIES
from fit3d_ns.backbones.backbone import Backbone, load_backbone
from fit3d_ns.backbones.identity import backbone_identity, spec_of_identity
from fit3d_ns.backbones.spec import Assembly, BackboneSpec
from fit3d_ns.backbones.students.published import (
    PUBLISHED_BACKBONES,
    PUBLISHED_REPOSITORY,
    PUBLISHED_REVISION,
    PublishedBackbone,
)
from fit3d_ns.backbones.students.result_folder import (
    CARD_NAME,
    DINOV2_NAME,
    HALF_NAME,
    STUDENT_NAME,
    WEIGHTS_NAME,
    damaged_card,
    read_card,
)
from fit3d_ns.backbones.weights.hub import DownloadError, cached_file, download_file, download_url, hash_matches
from fit3d_ns.backbones.weights.state_dicts import WEIGHT_SUFFIXES, weight_files
from fit3d_ns.support.errors import UserError


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned backbone that was found, and what is known of it before its weights are read."""

    source: str
    """What the user gave."""
    weights: Path
    """The weight file."""
    original: BackboneSpec | None = None
    """The backbone that was fine-tuned, with the layer and normalisation it was fine-tuned at, and without its weight
    file; None if the user has to say."""
    original_sha256: str | None = None
    """Hash of that backbone's tensors, where a card tells it."""
    weights_sha256: str | None = None
    """Hash of the fine-tuned tensors, where a card tells it."""
    assembly: Assembly = "concat"
    """How it is used unless its user says otherwise: ``tuned`` where a card says so, as for an averaged student."""


def find_fine_tuned(source: str | Path, flag: str) -> FineTuned:
    """Finds the fine-tuned backbone that a user's words mean; downloads it if it is not here.

    Args:
        source: A folder that fit3d-distill wrote, or one with a single .safetensors file; a weight file (of such a
            folder, or any other); or as a string also a name of `PUBLISHED_BACKBONES`, an https address of a weight
            file, or ``user/repo`` or ``user/repo@revision`` of the Hugging Face hub, as ``--push-to-hub`` fills it.
        flag: What the user calls this choice, for errors.

    Returns:
        The weight file and, from a card or the registry, the backbone it was fine-tuned from.

    Raises:
        UserError: If there is no such thing, it cannot be downloaded, or its card cannot be read.
    """
    text = str(source)
    if isinstance(source, str):
        if source in PUBLISHED_BACKBONES:
            return _published(PUBLISHED_BACKBONES[source])
        if "://" in source:
            if not urlsplit(source).path.endswith(WEIGHT_SUFFIXES):
                raise UserError(
                    f"{source} is no address of a weight file ({', '.join(WEIGHT_SUFFIXES)}): check {flag}."
                )
            return FineTuned(source, download_url(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _with_card(text, _weights_in(path, flag))
    if path.is_file():
        return _with_card(text, path)
    if isinstance(source, Path) or looks_like_path(source):
        raise UserError(f"There is no weight file {path}: check {flag}.")
    if "/" not in source:
        raise UserError(
            f"There is no file or folder {source}, and no fine-tuned backbone was published under that name: check "
            f"{flag}, or take one of {', '.join(PUBLISHED_BACKBONES)}."
        )
    return _in_hub(source, flag)


def load_fine_tuned(fine_tuned: FineTuned, spec: BackboneSpec, device: str | torch.device) -> Backbone:
    """Loads a fine-tuned backbone, strictly.

    Args:
        fine_tuned: See `find_fine_tuned`.
        spec: The original: its name, and the layer, norm and normalisation to use; ``weights`` is ignored.
        device: Where the model goes.

    Returns:
        The backbone, as `load_backbone` returns it.

    Raises:
        UserError: If the weights are damaged, of another backbone than ``spec`` names, or not those of their card.
    """
    check_original(fine_tuned, spec)
    backbone = load_backbone(replace(spec, weights=fine_tuned.weights), device)
    _check_hash(fine_tuned, backbone.identity["weights_sha256"])
    return backbone


def _check_hash(fine_tuned: FineTuned, weights_sha256: str) -> None:
    if fine_tuned.weights_sha256 not in (None, weights_sha256):
        raise UserError(
            f"{fine_tuned.weights} and the {CARD_NAME} beside it do not belong together (the weights' hash differs): "
            "copy both again from one training."
        )


def student_spec(path: Path, flag: str) -> BackboneSpec | None:
    """Returns a result of fit3d-distill as its card describes it, ready to be a teacher.

    Args:
        path: Its folder, or a weight file.
        flag: What the user calls this choice, for errors.

    Returns:
        Name, weights, layer, norm and normalisation; None for a weight file without a card.

    Raises:
        UserError: If a folder holds no result, or weights and card do not belong together.
    """
    path = path.expanduser()
    if not path.is_dir() and not path.with_name(CARD_NAME).is_file():
        return None
    found = find_fine_tuned(path, flag)
    if found.original is None:
        if path.is_dir() and found.weights.name == WEIGHTS_NAME:
            raise UserError(
                f"{path} holds no {CARD_NAME}: name a folder that fit3d-distill wrote, or a file with {flag}."
            )
        return None
    spec = replace(found.original, weights=found.weights.absolute())
    _check_hash(found, backbone_identity(spec)["weights_sha256"])
    return spec


def check_original(fine_tuned: FineTuned, spec: BackboneSpec) -> None:
    """Checks that a backbone is the one that was fine-tuned, as far as that is known.

    Args:
        fine_tuned: The result, and what its card says of its original.
        spec: The backbone that it is to stand beside.

    Raises:
        UserError: If it is another architecture, or has other published weights.
    """
    if fine_tuned.original is None:
        return
    wanted, known = describe_backbone(spec), describe_backbone(fine_tuned.original)
    if (wanted.timm_id, wanted.num_layers) != (known.timm_id, known.num_layers):
        raise UserError(
            f"{fine_tuned.source} was fine-tuned from {known.name}, not from {wanted.name}: name {known.name} with "
            f"{{backbone}}."
        )


def looks_like_path(text: str) -> bool:
    """Returns whether a text can only mean a place on this machine, no ``user/repo`` and no backbone's name.

    Args:
        text: What a user typed for weights or a backbone.
    """
    path = Path(text)
    return path.suffix in WEIGHT_SUFFIXES or path.is_absolute() or text[:1] in (".", "~") or text.count("/") > 1


def _weights_in(folder: Path, flag: str) -> Path:
    found = [folder / WEIGHTS_NAME]
    if not found[0].is_file():
        with suppress(UserError):
            return weight_files(folder)[0]  # as transformers or timm saves them
        found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if len(found) != 1:
        raise UserError(f"{folder} holds {len(found)} .safetensors files: name one with {flag}.")
    return found[0]


def _with_card(source: str, weights: Path) -> FineTuned:
    """Adds what the card says, if the file is one that has a card."""
    own_names = (WEIGHTS_NAME, STUDENT_NAME, HALF_NAME, DINOV2_NAME)
    if weights.name not in own_names or not weights.with_name(CARD_NAME).is_file():
        return FineTuned(source, weights)
    card = read_card(weights.parent)
    student = card["student"]
    try:
        original = spec_of_identity(student)
    except (KeyError, TypeError) as error:
        raise damaged_card(weights.parent, error) from None
    # The other two files hold rounded or renamed tensors.
    hashes = {WEIGHTS_NAME: card["weights_sha256"], STUDENT_NAME: card.get("student_sha256")}
    # A card of an earlier version has none; and the un-averaged student is better beside its original.
    assembly = card.get("assembly") if weights.name != STUDENT_NAME else None
    if assembly not in (None, *ASSEMBLIES):
        raise damaged_card(weights.parent, ValueError(f"assembly {assembly}"))
    found = FineTuned(source, weights, original, student["weights_sha256"], hashes.get(weights.name))
    return replace(found, assembly=assembly or found.assembly)


def _published(published: PublishedBackbone) -> FineTuned:
    names = [published.filename]
    path = cached_file(PUBLISHED_REPOSITORY, PUBLISHED_REVISION, names)
    try:
        path = path or download_file(PUBLISHED_REPOSITORY, PUBLISHED_REVISION, names)
    except DownloadError as error:
        raise UserError(
            f"The weights of {published.name} are not on this machine and could not be downloaded ({error}): download "
            f"{published.filename} from the Hugging Face repository {PUBLISHED_REPOSITORY} elsewhere and give that "
            f"file; its backbone is {published.original}."
        ) from None
    if not hash_matches(path, published.sha256):
        raise UserError(f"{path} is not the file that was published as {published.name} (its hash differs): delete it.")
    return FineTuned(published.name, path, BackboneSpec(published.original, normalization="imagenet"))


def _in_hub(source: str, flag: str) -> FineTuned:
    repository, _, revision = source.partition("@")
    names = (CARD_NAME, WEIGHTS_NAME)
    try:
        files: list[Path | None] = [download_file(repository, revision or None, [name]) for name in names]
    except DownloadError as error:
        files = [cached_file(repository, revision or None, [name]) for name in names]
        if None in files:
            raise UserError(
                f"There is no file or folder {source}, and {CARD_NAME} and {WEIGHTS_NAME} of a Hugging Face repository "
                f"of that name could not be downloaded ({error}): check {flag}, and the network."
            ) from None
    assert files[1] is not None
    return _with_card(source, files[1])
