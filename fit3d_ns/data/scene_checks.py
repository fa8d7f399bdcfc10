"""Checks of a user's scene: each problem in one sentence that names the file."""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from nerfstudio.data.datasets.base_dataset import InputDataset

from fit3d_ns.support.errors import UserError, first_line

SCENE_ADVICE = "check --data, and the dataparser named at the end of the command (nerfstudio-data, colmap, ...)."
"""What to do about a scene that cannot be read; commands that take runs put their own in its place."""


@contextmanager
def explain_unreadable_scene(data: Path | None) -> Iterator[None]:
    """Turns whatever a nerfstudio dataparser raises into one sentence.

    Args:
        data: The scene's folder or file, for the sentence.

    Raises:
        UserError: Instead of the dataparser's own exception.
    """
    if data is None or not Path(data).exists():
        raise UserError(f"The scene {data} does not exist: check --data.")
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"The scene {data} has seed points, which nerfstudio reads with Open3D, and that cannot be loaded "
            f"({error}): run `pip install open3d-cpu`, or install libusb-1.0 for the full Open3D."
        ) from error
    except EOFError as error:  # nerfstudio's colmap dataparser asks whether to shrink photos
        raise UserError(
            f"The photos of the scene {data} are large, and without a terminal the dataparser cannot ask to make "
            "smaller ones: end the command with `colmap --downscale-factor 1`, or run it in a terminal once."
        ) from error
    except (AssertionError, KeyError, IndexError, OSError, TypeError, ValueError, RuntimeError, struct.error) as error:
        if "No data found in dataset" in str(error):  # nerfstudio's assertion that the training split has views
            raise UserError(
                f"All views of the scene {data} are held out for evaluation: leave some for training (--eval-mode, or "
                "the train_filenames of transforms.json)."
            ) from error
        frames = _frames(Path(data))
        if frames is not None:
            _check_frames(Path(data), frames)
        detail = first_line(error)
        raise UserError(
            f"The scene {data} could not be read ({type(error).__name__}: {detail}): {SCENE_ADVICE}"
        ) from error


def check_split(train: InputDataset, evaluation: InputDataset) -> None:
    """Checks that there are views to compare.

    Args:
        train: Training views.
        evaluation: Held-out views.

    Raises:
        UserError: If there is only one view.
    """
    if len(train) + len(evaluation) < 2:
        raise UserError(f"The scene has only one view ({train.image_filenames[0]}): lifting needs at least two.")


def check_poses(*datasets: InputDataset) -> None:
    """Checks that every camera is a finite pose.

    Args:
        datasets: Splits whose cameras are checked.

    Raises:
        UserError: Naming the first photo whose pose or intrinsics are not finite.
    """
    for dataset in datasets:
        cameras = dataset.cameras
        values = torch.cat([cameras.camera_to_worlds.flatten(1), cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=1)
        broken = ~torch.isfinite(values).all(dim=1)
        if broken.any():
            data = dataset.image_filenames[0].parent.parent
            frames = _frames(data)
            if frames is not None:
                _check_frames(data, frames)
            name = dataset.image_filenames[int(broken.nonzero()[0])]
            raise UserError(f"The camera of {name} is not finite (NaN or infinite pose): remove or mend that view.")


def _frames(data: Path) -> list | None:
    """Frames of nerfstudio's ``transforms.json``; None for other formats."""
    path = data / "transforms.json" if data.is_dir() else data
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        frames = json.loads(path.read_text()).get("frames")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend it, or run ns-process-data again.") from error
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{path} holds no poses (`frames` is empty): run ns-process-data on the photos.")
    return frames


def _check_frames(data: Path, frames: list) -> None:
    """Names the frame that breaks a ``transforms.json``."""
    folder = data if data.is_dir() else data.parent
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict) or "file_path" not in frame:
            raise UserError(f"Frame {number} of the scene {data} has no file_path: mend transforms.json.")
        name = frame["file_path"]
        if "transform_matrix" not in frame:
            raise UserError(f"The photo {name} of the scene {data} has no pose (transform_matrix): mend or remove it.")
        try:
            pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"The pose of {name} in {data} is not a matrix of numbers ({error}): mend it.") from error
        if not torch.isfinite(pose).all():
            raise UserError(
                f"The pose of {name} in the scene {data} is not finite (NaN or infinite): remove or mend that view."
            )
        if not (folder / name).is_file():
            raise UserError(f"The photo {folder / name} is missing: restore it, or remove it from transforms.json.")
