"""Checks of a user's scene: each problem in one sentence that names the file."""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import UnidentifiedImageError

from fit3d_ns.data.folders import is_photo
from fit3d_ns.data.photos.view_files import missing_photo
from fit3d_ns.data.poses import check_poses
from fit3d_ns.support.errors import UserError, first_line
from fit3d_ns.support.foreign_files import what_it_is


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
    except FileNotFoundError as error:  # dataparsers open the first photo to see how large it is
        path = Path(error.filename) if isinstance(error.filename, (str, Path)) else None
        if path is None or not (is_photo(Path(path.name.strip())) or not path.suffix):
            raise _unreadable(data, error) from error
        raise missing_photo(path, data if data.is_dir() else data.parent) from error
    except UnidentifiedImageError as error:
        found = re.search("'(.+)'", str(error))
        what = None if found is None else what_it_is(Path(found[1]))
        if found is None:
            raise _unreadable(data, error) from error
        raise UserError(
            f"The photo {found[1]} is not an image ({what or 'its format is unknown'}): replace it."
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
        if "eval-frame-index" in str(error):  # nerfstudio's words
            raise UserError(
                f"--eval-mode filename wants photos of the scene {data} that have train or eval in their names: rename "
                "them, or choose another --eval-mode."
            ) from error
        raise _unreadable(data, error) from error


def _unreadable(data: Path, error: Exception) -> UserError:
    return UserError(
        f"The scene {data} could not be read ({type(error).__name__}: {first_line(error)}): {{scene_advice}}"
    )


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
