"""The viewer's controls for features: buttons, sliders and clicks."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.utils import get_camera
from nerfstudio.viewer.viewer_elements import (
    ViewerButton,
    ViewerCheckbox,
    ViewerClick,
    ViewerControl,
    ViewerElement,
    ViewerSlider,
    ViewerText,
)
from torch import nn

from fit3d_ns.runs.record import read_disagreement
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer.feature_view import FeatureView
from fit3d_ns.viewer.query import export_segment, look_at_pixel

_LOGGER = logging.getLogger(__name__)

MARKER = "/fit3d/clicked"
"""Name of the ball at the clicked point among the viewer's objects."""
_MARKER_RADIUS = 0.1


class StatusLine(ViewerElement[str]):
    """A line of text that says what the last button did.

    Args:
        text: What is said at first.
    """

    def __init__(self, text: str) -> None:
        super().__init__("Status")
        self._text = text
        self._handle: Any = None

    @property
    def text(self) -> str:
        """What is said now."""
        return self._text

    def say(self, text: str) -> None:
        """Says something else.

        Args:
            text: One line.
        """
        self._text = text
        if self._handle is not None:
            self._handle.content = text

    def _create_gui_handle(self, viser_server: Any) -> None:
        self._handle = viser_server.gui.add_markdown(self._text)

    def install(self, viser_server: Any) -> None:
        """Puts the line into the viewer."""
        self._create_gui_handle(viser_server)


class FeatureViewerControl(ViewerControl):
    """Learns of the viewer when it starts.

    Args:
        started: Called with nerfstudio's viewer.
    """

    def __init__(self, started: Callable[[Any], None]) -> None:
        self._started = started

    def _setup(self, viewer: Any) -> None:
        super()._setup(viewer)
        self._started(viewer)


class FeatureControls(nn.Module):
    """The viewer's folder ``features``; nerfstudio finds elements among the attributes of modules, in order of name.

    Args:
        view: What the controls change.
    """

    def __init__(self, view: FeatureView) -> None:
        super().__init__()
        self._view = view
        self.a_status = StatusLine("Choose an output above.")
        self.b_refresh = ViewerButton("Refresh PCA", self.reporting(self._refresh))
        self.c_click = ViewerButton("Click to query", self.reporting(self._await_click))
        self.d_threshold = ViewerSlider(
            "Threshold", view.threshold, 0.0, 1.0, 0.01, cb_hook=self._set_threshold, hint="Least cosine to the click"
        )
        self.e_segment = ViewerCheckbox(
            "Segment by similarity", False, cb_hook=self.reporting(self._set_segment), hint="Show similar parts alone"
        )
        self.f_file = ViewerText("Segment file", "segment.ply", hint="Below the run's folder, or an absolute path")
        self.g_export = ViewerButton("Export segment", self.reporting(self._export))
        self.h_clusters = ViewerSlider(
            "Clusters", view.num_clusters, 2, 20, 1, cb_hook=self._set_clusters, hint="k of the k-means"
        )
        self.i_variance = ViewerButton("Compute view variance", self.reporting(self._compute_variance))
        self.z_control = FeatureViewerControl(self._start)

    def reporting(self, action: Callable[[], str]) -> Callable[[Any], None]:
        """Returns a button's callback that says the outcome of an action, good or bad, in the status line.

        Args:
            action: Does something and returns a sentence.
        """

        def run(_: Any) -> None:
            try:
                self.a_status.say(action())
            except UserError as error:
                self.a_status.say(str(error))
            except Exception as error:  # a button must say that it failed: nerfstudio drops the exception
                _LOGGER.exception("A button of the viewer failed.")
                self.a_status.say(f"That failed ({type(error).__name__}: {error}).")

        return run

    def _start(self, viewer: Any) -> None:
        self._view.viewer = viewer
        self._view.prepare()
        self._run = Path(viewer.log_filename).parent
        port, asked = viewer.viser_server.get_port(), viewer.config.websocket_port
        if asked is not None and port != asked:
            _LOGGER.warning(f"The port {asked} is in use: the viewer is at http://localhost:{port}.")
        try:
            stored = read_disagreement(self._run)
            if stored is not None:
                self._view.take_disagreement(*stored)
        except UserError as error:
            _LOGGER.warning(str(error))

    def _refresh(self) -> str:
        self._view.refresh()
        return "Colours and clusters follow the features as they are now."

    def _await_click(self) -> str:
        self.z_control.register_pointer_cb("click", self._query)
        return "Click on the scene."

    def _query(self, click: ViewerClick) -> None:
        """Runs in a thread of its own, without nerfstudio's lock."""
        viewer = self._view.viewer
        self.z_control.unregister_pointer_cb()
        with viewer.train_lock if viewer.train_lock is not None else nullcontext():
            self.reporting(lambda: self._take(click))(None)
        viewer._trigger_rerender()

    def _take(self, click: ViewerClick) -> str:
        viewer = self._view.viewer
        panel = viewer.control_panel
        box = panel.crop_obb if panel.crop_viewport else None
        point = look_at_pixel(self._view, self._camera_of(click), click.screen_pos, box)
        self._view.query = point.feature
        place = tuple(float(value) * panel.viser_scale_ratio for value in point.position)
        viewer.viser_server.scene.add_icosphere(MARKER, radius=_MARKER_RADIUS, color=(255, 255, 255), position=place)
        count = int(self._view.similar().sum())
        return f"{count:,} Gaussians are similar to the clicked point. Choose the output `similarity`."

    def _camera_of(self, click: ViewerClick) -> Cameras:
        """The camera of the picture that was clicked on; nerfstudio does not say whose browser it was."""
        viewer = self._view.viewer
        states = [viewer.get_camera_state(client) for client in viewer.viser_server.get_clients().values()]
        if not states:
            raise UserError("The browser is gone.")
        origin = torch.tensor(click.origin).double()
        state = min(states, key=lambda state: float((state.c2w[:, 3] - origin).norm()))
        longest = viewer.control_panel.max_res
        height = longest if state.aspect <= 1 else int(longest / state.aspect)
        return get_camera(state, height, int(height * state.aspect)).to(self._view.model.device)

    def _set_threshold(self, slider: ViewerSlider) -> None:
        self._view.threshold = float(slider.value)

    def _set_clusters(self, slider: ViewerSlider) -> None:
        self._view.num_clusters = int(slider.value)

    def _set_segment(self) -> str:
        self._view.segment = bool(self.e_segment.value)
        if not self._view.segment:
            return "The whole scene is shown."
        return f"{int(self._view.similar().sum()):,} similar Gaussians are shown alone."

    def _export(self) -> str:
        path = self._run / Path(self.f_file.value).expanduser()
        count = export_segment(self._view, path)
        return f"{count:,} Gaussians are in {path}."

    def _compute_variance(self) -> str:
        self._view.compute_disagreement()
        return "Choose the output `view_variance`."
