"""Files from the network: of the Hugging Face hub, in its own cache, and of any https address."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_path, is_complete_safetensors, user_cache_directory

_REACH_SECONDS = 5.0


class DownloadError(Exception):
    """Why a file could not be had from the network; its text is one line.

    Args:
        cause: What the client raised.
    """

    def __init__(self, cause: BaseException) -> None:
        lines = str(cause).strip().splitlines()
        super().__init__(f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__)


def cached_file(repository: str, revision: str | None, filenames: Sequence[str]) -> Path | None:
    """Returns the first of a repository's files that is on this machine; None if there is none.

    Args:
        repository: ``user/name``.
        revision: Branch, tag or commit; None for the main branch.
        filenames: In the order in which they are preferred.
    """
    # hf_hub_download(local_files_only=True) would do, but newer releases reach for the network even then.
    from huggingface_hub import try_to_load_from_cache

    for filename in filenames:
        found = try_to_load_from_cache(repository, filename, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def offered_file(repository: str, revision: str | None, filenames: Sequence[str]) -> str | Exception:
    """Asks the hub, without the client's long retries, which of the files it has; else returns why there is none.

    Args:
        repository: ``user/name``.
        revision: Branch, tag or commit; None for the main branch.
        filenames: In the order in which they are preferred.

    Returns:
        The first of the names that the hub has, or why there is none.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    reason: Exception = FileNotFoundError(repository)
    for filename in filenames:
        try:
            get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=_REACH_SECONDS)
            return filename
        except Exception as error:  # The client's HTTP library, and so its errors, changed between releases.
            reason = error
    return reason


def download_file(repository: str, revision: str | None, filenames: Sequence[str]) -> Path:
    """Returns the first of the files that the hub has, its newest version of that revision.

    Args:
        repository: ``user/name``.
        revision: Branch, tag or commit; None for the main branch.
        filenames: In the order in which they are preferred.

    Raises:
        DownloadError: If the hub has none of them or cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    offered = offered_file(repository, revision, filenames)
    if isinstance(offered, str):
        try:
            return Path(hf_hub_download(repository, offered, revision=revision))
        except Exception as error:  # As above; and the user needs the same advice whatever the cause.
            offered = error
    raise DownloadError(offered) from None


def download_url(url: str) -> Path:
    """Returns the file behind an address, downloaded once into the user's cache.

    Args:
        url: An ``https`` address. If it ends in ``#sha256=...``, the file's hash must begin with that.

    Returns:
        Path of a whole file, with the suffix of the address.

    Raises:
        UserError: If the address is no https address, cannot be downloaded, or the file has another hash.
    """
    import torch.hub

    parts = urlsplit(url)
    if parts.scheme != "https":
        raise UserError(f"{url} is no https address: weights come by https only; download it and give the file.")
    name = Path(parts.path).name
    key = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()  # many addresses end in the same file name
    path = user_cache_directory() / "weights" / f"{key}-{name}"
    if path.is_file() and _is_whole(path, path.suffix):
        return path
    key_name, _, sha256 = parts.fragment.partition("=")
    expected = sha256.lower() if key_name == "sha256" and sha256 else None
    try:
        with atomic_path(path) as temporary:
            torch.hub.download_url_to_file(parts._replace(fragment="").geturl(), str(temporary), expected)
            if not _is_whole(temporary, path.suffix):
                raise OSError("what came is no weight file, or not all of it")
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        raise UserError(
            f"{url} could not be downloaded ({DownloadError(cause)}): check the address and the network, or download "
            "it elsewhere and give the file."
        ) from None
    return path


def hash_matches(path: Path, sha256: str) -> bool:
    """Returns whether a file has a SHA-256.

    Args:
        path: A file that exists.
        sha256: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == sha256


def _is_whole(path: Path, suffix: str) -> bool:
    # torch.hub takes a connection that breaks off for the end of the file, and a web page for weights.
    if suffix == ".safetensors":
        return is_complete_safetensors(path)
    with path.open("rb") as file:
        old_torch_file = file.read(1) == b"\x80"
    return old_torch_file or zipfile.is_zipfile(path)
