"""Checks of a user's scene: each problem in one sentence that names the file."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nerfstudio.data.datasets.base_dataset import InputDataset

from fit3d_ns.data.poses import check_poses
from fit3d_ns.support.errors import UserError, first_line


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
            f"The dataparser of the scene {data} needs a package that cannot be loaded ({first_line(error)}): install "
            "it (open3d-cpu in place of open3d where libusb-1.0 is missing)."
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
        detail = first_line(error)
        raise UserError(
            f"The scene {data} could not be read ({type(error).__name__}: {detail}): {{scene_advice}}"
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


def check_cameras_together(*datasets: InputDataset) -> None:
    """Judges the poses of all views of a scene together, as they come out of its dataparser.

    Args:
        datasets: Its splits.

    Raises:
        UserError: See `fit3d_ns.data.poses.check_poses`; also for a scale that all rotations have in common.
    """
    with_views = [dataset for dataset in datasets if len(dataset) > 0]
    matrices = [pose for dataset in with_views for pose in dataset.cameras.camera_to_worlds.double().numpy()]
    names = [str(path) for dataset in with_views for path in dataset.image_filenames]
    source = "the scene"
    for remark in check_poses(matrices, names, source).remarks:
        raise UserError(remark)
