"""Where the repository and the tests' data lie."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
TINY_ROOM = DATA / "tiny_room"
