"""Where fit3d-ns keeps files that can be made again, and whether such a file is whole."""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open


def user_cache_directory() -> Path:
    """Returns the folder for files that can be made again: ``$FIT3D_CACHE``, else the XDG cache, else ``~/.cache``."""
    if own := os.environ.get("FIT3D_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "fit3d"
    return Path.home() / ".cache" / "fit3d"


def is_complete_safetensors(path: Path) -> bool:
    """Tells whether ``path`` is a safetensors file whose size agrees with its header (reads the header only)."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
