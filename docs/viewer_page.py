"""nerfstudio's viewer in a real browser, for tests and for the pictures of the documentation.

Needs Playwright (``pip install playwright``) and Chromium: the system's, or Playwright's own.
"""

import importlib.util
import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--no-sandbox --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist"
)
"""WebGL on the CPU, and no traffic but the page's."""
_LONGEST = 900_000
"""Milliseconds that anything may take: on a machine that is busy with other work a picture takes minutes."""
_STEADY_CLOCK = """(() => {
    let now = performance.now();
    const tick = () => { now += 1000 / 60; requestAnimationFrame(tick); };
    requestAnimationFrame(tick);
    performance.now = () => now;
})();"""
"""Viser shows a fifth of the pixels where it measures few frames a second, as without a GPU; so it measures 60."""


def find_chromium() -> str | None:
    """Returns the path of a Chromium, or None."""
    on_path = next((path for name in _NAMES if (path := shutil.which(name))), None)
    own = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    return on_path or next((str(path) for path in sorted(own.glob("chromium-*/chrome-linux*/chrome"))), None)


def missing() -> str | None:
    """Returns what a browser lacks on this machine, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed (pip install playwright)"
    if find_chromium() is None:
        return "there is no Chromium (apt install chromium, or playwright install chromium)"
    return None


@contextmanager
def running_viewer(pipeline: Any, run: Path, **fields: Any) -> Iterator[Any]:
    """Runs nerfstudio's viewer on a pipeline, as ``ns-viewer`` does, on a free port.

    Args:
        pipeline: In evaluation mode.
        run: The run's folder.
        fields: Of nerfstudio's ``ViewerConfig``.
    """
    from nerfstudio.configs.base_config import ViewerConfig
    from nerfstudio.viewer.viewer import Viewer

    config = ViewerConfig(websocket_host="127.0.0.1", num_rays_per_chunk=1, **fields)
    viewer = Viewer(config, run / "viewer_log", pipeline.datamanager.get_datapath(), pipeline, train_lock=Lock())
    viewer.init_scene(pipeline.datamanager.train_dataset, "completed", pipeline.datamanager.eval_dataset)
    try:
        yield viewer
    finally:
        viewer.viser_server.stop()


class ViewerPage:
    """The viewer in one browser window.

    Args:
        page: Playwright's, with the viewer open.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        page.get_by_text("Resolution: ").wait_for(timeout=_LONGEST)
        page.get_by_label("Output type", exact=True).wait_for(timeout=_LONGEST)

    def choose(self, output: str) -> None:
        """Chooses an output."""
        self.page.get_by_label("Output type", exact=True).click()
        self.page.get_by_role("option", name=output, exact=True).click()

    def press(self, button: str) -> None:
        """Presses a button."""
        self.page.get_by_role("button", name=button, exact=True).click()

    def tick(self, checkbox: str) -> None:
        """Changes a checkbox."""
        self.page.get_by_label(checkbox, exact=True).click()

    def wait_for_text(self, text: str) -> None:
        """Waits until the page says something."""
        self.page.get_by_text(text).wait_for(timeout=_LONGEST)

    def click_scene(self, x: float, y: float) -> None:
        """Clicks at shares of the scene's width and height, from its upper left corner."""
        box = self._scene()
        self.page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])

    def window(self) -> np.ndarray:
        """Returns the whole window, [H, W, 3] uint8."""
        return _decoded(self.page.screenshot())

    def picture(self) -> np.ndarray:
        """Returns what the window shows of the scene, [H, W, 3] uint8."""
        return _decoded(self.page.screenshot(clip=self._scene()))

    def settled(self, seconds: float = _LONGEST / 1000) -> np.ndarray:
        """Returns what the window shows once it has not changed for a while.

        Raises:
            TimeoutError: If it goes on changing.
        """
        end = time.monotonic() + seconds
        last, same = self.picture(), 0
        while time.monotonic() < end:
            time.sleep(0.5)
            now = self.picture()
            same = same + 1 if np.array_equal(now, last) else 0
            last = now
            if same >= 3:
                return now
        raise TimeoutError(f"the viewer's picture still changes after {seconds:.0f} s")

    def _scene(self) -> dict[str, float]:
        return self.page.locator("canvas[data-engine]").bounding_box()


def _decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@contextmanager
def browser(width: int = 900, height: int = 560, sharp: bool = False) -> Iterator[Any]:
    """Starts Chromium.

    Args:
        width: Of its windows, pixels; 320 of them are the viewer's control panel.
        height: Likewise.
        sharp: Show all pixels, however slow the machine is.

    Yields:
        A function that opens the viewer's address in a window of its own and returns a `ViewerPage`.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=_FLAGS.split())

        def open_viewer(url: str) -> ViewerPage:
            page = chromium.new_context(viewport={"width": width, "height": height}).new_page()
            page.set_default_timeout(_LONGEST)
            if sharp:
                page.add_init_script(_STEADY_CLOCK)
            page.goto(url, wait_until="commit")
            return ViewerPage(page)

        try:
            yield open_viewer
        finally:
            chromium.close()


def stand_at(viewer: Any, view: int) -> None:
    """Puts every browser's camera where a training photo was taken, as a click on its frustum does.

    Args:
        viewer: nerfstudio's.
        view: Position in the training split.
    """
    frustum = viewer.camera_handles[view]
    for client in viewer.viser_server.get_clients().values():
        with client.atomic():
            client.camera.position, client.camera.wxyz = frustum.position, frustum.wxyz


def address(viewer: Any) -> str:
    """Returns the viewer's address."""
    return f"http://127.0.0.1:{viewer.viser_server.get_port()}"
