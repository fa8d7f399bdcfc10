"""``python -m benchmarks.faults``: see `FaultsConfig`."""

import sys
import time

import tyro

from benchmarks.faults.harness import FaultsConfig, run_all, table, write


def main(config: FaultsConfig) -> int:
    """Runs the cases.

    Args:
        config: The user's choices.

    Returns:
        The exit status: 1 if one ended as it must not.
    """
    start = time.monotonic()
    records, reads = run_all(config)
    write(config, records, reads, time.monotonic() - start)
    print(table(records))
    return int(not all(record["good"] for record in records))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(FaultsConfig)))
