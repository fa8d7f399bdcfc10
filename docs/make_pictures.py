"""Makes the pictures of the viewer in docs/pictures: a room, its splat, lifted features, and a browser that looks.

    python docs/make_pictures.py

Some minutes on two CPU cores. Needs what `viewer_page` needs, and ``ns-train`` to work.
"""

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import viewer_page
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image

from fit3d_ns.runs.names import CONFIG
from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import UserError
from fit3d_rooms.cli import RoomsConfig, make_rooms

OUTPUTS = ("rgb", "teacher_pca", "feature_pca", "similarity", "view_variance", "clusters")


@dataclass
class MakePictures:
    """Makes the pictures of the viewer in docs/pictures."""

    output_dir: Path = Path("outputs/pictures")
    """Where the room and its run go."""
    pictures: Path = Path(__file__).parent / "pictures"
    """Where the pictures go."""
    load_config: Path | None = None
    """A run to show instead of a new one."""
    backbone: str = "dinov2_small_focus"
    """Teacher."""
    steps: int = 700
    """Training steps."""
    views: int = 40
    """Photos of the room."""
    seed: int = 1
    """Seed of the room."""
    stand_at: int = 0
    """Training view that is looked at."""
    click: tuple[float, float] = (0.3, 0.8)
    """Where the scene is clicked, as shares of width and height."""


def train(command: MakePictures) -> Path:
    """Trains a splat of a room and lifts features onto it; returns the run's ``config.yml``."""
    from fit3d_ns.config import fit3d_splat

    room = make_rooms(RoomsConfig(out=command.output_dir / "rooms", scenes=1, views=command.views, seed=command.seed))[
        0
    ]
    config: Any = deepcopy(fit3d_splat.config)
    config.output_dir = command.output_dir
    config.set_timestamp()
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    config.max_num_iterations = command.steps
    config.steps_per_eval_image = config.steps_per_eval_all_images = command.steps + 1
    config.pipeline.datamanager.data = room
    config.pipeline.datamanager.backbone = command.backbone
    config.optimizers["means"]["scheduler"].max_steps = command.steps
    model = config.pipeline.model
    model.features = "lift"
    model.background_color, model.num_downscales, model.sh_degree = "black", 0, 1
    model.warmup_length, model.stop_split_at, model.reset_alpha_every = 200, command.steps * 6 // 10, 10**6
    config.save_config()
    torch.manual_seed(command.seed)
    trainer = config.setup()
    trainer.setup()
    trainer.train()
    return trainer.base_dir / CONFIG


def look(command: MakePictures, config_path: Path) -> dict[str, np.ndarray]:
    """Opens a run in the viewer and returns what the browser shows of each output, [H, W, 3] uint8, and ``window``."""
    _, pipeline, _, _ = eval_setup(config_path)
    with ExitStack() as stack:
        viewer = stack.enter_context(viewer_page.running_viewer(pipeline, config_path.parent))
        open_viewer = stack.enter_context(viewer_page.browser(width=1120, height=652, sharp=True))
        viewer.control_panel._max_res.value = 800
        page = open_viewer(viewer_page.address(viewer))
        page.press("Hide Train Cams")
        viewer_page.stand_at(viewer, command.stand_at)
        page.settled()
        page.press("Click to query")
        page.wait_for_text("Click on the scene.")
        page.click_scene(*command.click)
        page.wait_for_text("are similar to the clicked point")
        pictures = {}
        for output in OUTPUTS:
            page.choose(output)
            pictures[output] = page.settled()
            if output == "similarity":
                page.page.get_by_text("are similar to the clicked point").scroll_into_view_if_needed()
                pictures["window"] = page.window()
        return pictures


def write(pictures: dict[str, np.ndarray], folder: Path) -> None:
    """Writes the pictures as small JPEG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        image = Image.fromarray(picture)
        image.thumbnail((960, 960) if name == "window" else (480, 480), Image.Resampling.LANCZOS)
        image.save(folder / f"viewer_{name}.jpg", quality=85, optimize=True)


def main(command: MakePictures) -> None:
    """Makes the pictures.

    Raises:
        UserError: If there is no browser.
    """
    lacking = viewer_page.missing()
    if lacking is not None:
        raise UserError(f"Pictures of the viewer need a browser: {lacking}.")
    write(look(command, command.load_config or train(command)), command.pictures)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(MakePictures)))
