"""nerfstudio's viewer with browsers that only remember the pictures they are sent."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import viewer_page
import viser.transforms as vtf
from nerfstudio.viewer.render_state_machine import RenderAction, RenderStateMachine
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO


@contextmanager
def running_viewer(pipeline, run, **viewer_fields):
    """Nerfstudio's viewer with pictures small enough for a CPU."""
    with viewer_page.running_viewer(pipeline, run, **viewer_fields) as viewer:
        viewer.control_panel._max_res.value = 128
        yield viewer


class FakeBrowser:
    """A browser to nerfstudio's render thread; leaves the thread to nerfstudio, as it is."""

    def __init__(self, viewer, pose, aspect=4 / 3):
        """Opens the viewer.

        Args:
            viewer: nerfstudio's.
            pose: [3, 4] camera to world, OpenGL axes.
            aspect: Width over height.
        """
        self.viewer = viewer
        self.pictures = []
        rotation = vtf.SO3.from_matrix(pose[:3, :3].double().numpy()) @ vtf.SO3.from_x_radians(np.pi)
        self.camera = SimpleNamespace(
            fov=1.2,
            aspect=aspect,
            wxyz=rotation.wxyz,
            position=pose[:3, 3].double().numpy() * VISER_NERFSTUDIO_SCALE_RATIO,
        )
        self.scene = SimpleNamespace(
            set_background_image=lambda image, **_: self.pictures.append(image), _scene_pointer_cb=None
        )
        self.thread = RenderStateMachine(viewer, VISER_NERFSTUDIO_SCALE_RATIO, self)  # type: ignore[arg-type]
        self.thread.start()

    def look(self, output=None, seconds=900.0):
        """Returns the picture of an output at full resolution, [H, W, 3] uint8.

        Args:
            output: Chosen for all browsers; without it the one chosen before.
            seconds: Longest wait.
        """
        if output is not None:
            self.viewer.control_panel._output_render.value = output
        before = len(self.pictures)
        self.thread.action(RenderAction("move", self.viewer.get_camera_state(self)))
        end, move = time.monotonic() + seconds, time.monotonic() + 5
        while time.monotonic() < end and self.alive:
            if time.monotonic() > move:  # a first picture that was interrupted is not made again by itself
                self.thread.action(RenderAction("move", self.viewer.get_camera_state(self)))
                move = time.monotonic() + 5
            # The first picture may still be of what was chosen before; small ones are for while the camera moves.
            if len(self.pictures) >= before + 2 and max(self.pictures[-1].shape) == self.viewer.control_panel.max_res:
                return self.pictures[-1]
            time.sleep(0.02)
            self.thread.action(RenderAction("static", self.viewer.get_camera_state(self)))  # sooner than by itself
        assert self.alive, "the render thread died"
        raise AssertionError(f"no picture of {output} within {seconds} s")

    @property
    def alive(self):
        """Whether the render thread lives."""
        return self.thread.is_alive()

    def close(self):
        """Closes the browser."""
        self.thread.running = False
        self.thread.join(timeout=900)
