"""Where the repository and the tests' data lie, and which tests take long."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
TINY_ROOM = DATA / "tiny_room"

LONGEST_FIRST = (
    "test_faults.py",
    "test_loop.py",
    "test_commands.py",
    "test_demo.py",
    "test_viewer_browser.py",
    "test_notebook.py",
    "test_distributed.py",
    "test_lifting_runs.py",
    "test_viewer_outputs.py",
    "test_probe_run.py",
    "test_viewer_controls.py",
    "test_engines.py",
    "test_rooms.py",
    "test_training.py",
    "test_exact_run.py",
    "test_probing.py",
)
"""Files that take more than about half a minute: begun last, they would run while the other processes have no work."""
