"""``python -m benchmarks.evidence``: see `EvidenceConfig`."""

import tyro

from benchmarks.evidence.config import EvidenceConfig
from benchmarks.evidence.pieces import Piece, Records, run_pieces, to_do
from benchmarks.evidence.plan import Plan
from benchmarks.evidence.tables import write_tables
from fit3d_ns.support.command_line import run_command


def main(config: EvidenceConfig) -> None:
    """Makes what is missing.

    Args:
        config: The user's choices.
    """
    records = Records(config.output / "records")
    plan = Plan(config, records)
    pieces = to_do(plan.pieces, records, config.only, config.pieces)
    places = {"scene": config.scene_jobs, "student": config.jobs, "light": 4, "measuring": 1}
    if config.plan:
        print_plan(pieces, places)
        return
    if pieces:
        run_pieces(pieces, records, places)
    if not config.only or "tables" in config.only:
        write_tables(config.output / "records", config.output)


def print_plan(pieces: list[Piece], places: dict[str, int]) -> None:
    """Prints the steps that are still to be made.

    Args:
        pieces: Steps that are still to be made.
        places: How many run at a time, by kind.
    """
    for piece in pieces:
        print(f"{piece.seconds / 60:6.1f} min  {piece.name}")
    total = sum(piece.seconds for piece in pieces)
    print(f"{total / 60:6.0f} min  of one H100 for {len(pieces)} steps, at most {places['student']} students at a time")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(EvidenceConfig)))
