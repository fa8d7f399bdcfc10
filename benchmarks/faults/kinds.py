"""What all damage has in common."""

import random
from collections.abc import Callable
from pathlib import Path

Mutation = Callable[[Path, random.Random], None]
"""Changes a file in place; draws what it needs from the generator. What does not apply raises `NotApplicable`."""
MARKER = "FIT3D_FAULTS_MARKER"
"""Environment variable that names a file which code from a damaged file would make."""
HUGE = 2**40


class NotApplicable(Exception):
    """This damage cannot be done to this file."""


def overwrite(make: Callable[[bytes, random.Random], bytes]) -> Mutation:
    """Returns a mutation that makes other bytes of a file's.

    Args:
        make: Takes a file's bytes to others.
    """

    def mutate(path: Path, rng: random.Random) -> None:
        path.write_bytes(make(path.read_bytes(), rng))

    return mutate
