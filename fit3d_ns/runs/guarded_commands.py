"""nerfstudio's own commands on a run: they run nothing that stands in its files, and end in a sentence."""

import sys
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

import torch
import yaml

from fit3d_ns.support.errors import UserError

_OF_NO_CHECKPOINT = (LookupError, ValueError, OSError, AssertionError)
"""What nerfstudio raises where it finds no checkpoint that it can choose."""


def guard_nerfstudio(
    read_configuration: Callable[[str, Path | None], Any], read_checkpoint: Callable[[Path], Any]
) -> None:
    """Lets nerfstudio's own commands read a run's files without running what stands in them.

    ``ns-eval``, ``ns-viewer``, ``ns-render``, ``ns-export`` and ``ns-train --load-config`` read ``config.yml`` with
    ``yaml.Loader``, which calls whatever the file names, and checkpoints with torch's default, which before torch 2.6
    unpickles anything (``nerfstudio/utils/eval_utils.py``, ``scripts/train.py``, ``engine/trainer.py`` of 1.1.5).
    Other callers of ``yaml.load`` and ``torch.load`` are left alone.

    Args:
        read_configuration: Builds a configuration from its text; the path is for the error's sentence.
        read_checkpoint: Takes a checkpoint's path to its content, without running code from it.
    """
    load_yaml, load_torch = yaml.load, torch.load
    if getattr(load_yaml, "guards_nerfstudio", False):
        return

    def guarded_yaml(stream: Any, Loader: Any) -> Any:
        caller = sys._getframe(1)
        if not _is_of_nerfstudio(caller.f_code.co_filename) or issubclass(Loader, yaml.SafeLoader):
            return load_yaml(stream, Loader)
        return read_configuration(stream if isinstance(stream, str) else stream.read(), _named_configuration(caller))

    def guarded_torch(f: Any, *arguments: Any, **more: Any) -> Any:
        is_checkpoint = isinstance(f, (str, Path)) and Path(f).suffix == ".ckpt"
        if is_checkpoint and _is_of_nerfstudio(sys._getframe(1).f_code.co_filename):
            return read_checkpoint(Path(f))
        return load_torch(f, *arguments, **more)

    guarded_yaml.guards_nerfstudio = True  # type: ignore[attr-defined]
    yaml.load, torch.load = guarded_yaml, guarded_torch


def install_error_hook() -> None:
    """Lets errors of a user end any ``ns-*`` command in one sentence.

    These are a ``UserError``, a ``config.yml`` that cannot be read, and a run without a checkpoint, of which nerfstudio
    (``eval_load_checkpoint`` of 1.1.5) takes the last of an empty list.
    """
    previous = sys.excepthook
    if getattr(previous, "prints_user_errors", False):
        return

    def hook(kind, error, traceback):
        if isinstance(error, UserError):
            print(f"Error: {error}", file=sys.stderr)
        elif isinstance(error, (LookupError, ValueError, OSError, AssertionError)) and (
            folder := _without_checkpoint(traceback)
        ):
            print(
                f"Error: {folder} holds no checkpoint, or a file beside them that is none: restore step-*.ckpt, or "
                "name another run with --load-config.",
                file=sys.stderr,
            )
        elif isinstance(error, (OSError, UnicodeDecodeError)) and (path := _unread_configuration(traceback)):
            reason = getattr(error, "strerror", None) or error
            print(f"Error: The configuration {path} cannot be read ({reason}): check --load-config.", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook.prints_user_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _without_checkpoint(traceback: Any) -> Path | None:
    """The folder among whose files nerfstudio found no newest checkpoint, where it failed at that."""
    frames = [frame for frame, _ in walk_tb(traceback)]
    chooses = (frame for frame in frames if frame.f_code.co_name == "eval_load_checkpoint")
    frame = next((one for one in chooses if _is_of_nerfstudio(one.f_code.co_filename)), None)
    if frame is None or frames[-1].f_code.co_filename != frame.f_code.co_filename:
        return None  # or the failure was in what the checkpoint holds
    return frame.f_locals["config"].load_dir


def _unread_configuration(traceback: Any) -> Path | None:
    """The configuration that nerfstudio could not read, where it failed at that."""
    frames = [frame for frame, _ in walk_tb(traceback)]
    read = (outer for outer, inner in zip(frames, frames[1:]) if inner.f_code.co_name == "read_text")
    return next((_named_configuration(frame) for frame in read if _is_of_nerfstudio(frame.f_code.co_filename)), None)


def _named_configuration(frame: FrameType) -> Path | None:
    return frame.f_locals.get("config_path") or getattr(frame.f_locals.get("config"), "load_config", None)


def _is_of_nerfstudio(filename: str) -> bool:
    import nerfstudio

    return any(Path(filename).is_relative_to(folder) for folder in nerfstudio.__path__)
