"""Nothing is imported or compiled within a render of the viewer, which nerfstudio ends at any line."""

import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT

PROGRAM = """
import sys, threading
from pathlib import Path
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.viewer.render_state_machine import RenderStateMachine
import fake_browser
from fit3d_ns.viewer.outputs import PICTURES

late = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if isinstance(threading.current_thread(), RenderStateMachine):
            late.append(name)
sys.meta_path.insert(0, Watch())
run = Path(sys.argv[1])
_, pipeline, *_ = eval_setup(run / "config.yml", test_mode="inference")
with fake_browser.running_viewer(pipeline, run) as viewer:
    from fit3d_ns.rasterization import kernels
    compiled = [name for name in vars(kernels) if hasattr(getattr(kernels, name), "signatures")]
    before = {name: len(getattr(kernels, name).signatures) for name in compiled}
    pose = pipeline.datamanager.train_dataset.cameras.camera_to_worlds[0]
    browser = fake_browser.FakeBrowser(viewer, pose)
    for name in ("rgb", "depth", *PICTURES):
        assert browser.look(name).size, name
    after = {name: len(getattr(kernels, name).signatures) for name in compiled}
    assert browser.thread.is_alive() and compiled and before == after, (before, after)
print("late", sorted(set(late)))
"""


def test_a_browsers_pictures_import_and_compile_nothing(viewed_run):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "docs", Path(__file__).parents[1])))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(viewed_run.base_dir)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().splitlines()[-1] == "late []", result.stdout
