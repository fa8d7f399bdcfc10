"""What the evidence is made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Stage = Literal["geometry", "lifts", "students", "development", "test", "tables"]
Kind = Literal["lifted", "control", "control-blur", "control-shift"]


@dataclass
class EvidenceConfig:
    """Measures what distillation is worth on your own scenes, against controls without 3D, with nothing left to chance.

    Every step writes its JSON file last, and what has one is not done again: a run that was stopped goes on where it
    was, and any step can be made alone.
    """

    scenes: tuple[Path, ...]
    """Scenes in nerfstudio's format, in the order in which the curve over the number of scenes takes them."""
    nyu: Path
    """NYUv2, in the folder layout of fit3d-probe with {train,test}, {train,test}annot, {train,test}depth, classes.txt.
    Never trained on."""
    camvid: Path
    """CamVid in the same layout, without depth. Never trained on."""
    match: Path
    """Scene with measured depth, whose last frames are kept out of all training, to count matches between views."""
    match_frames: int = 25
    """So many of its last frames are kept out."""
    match_step: int = 4
    """Frames from one view of a pair to the other."""
    backbone: str = "dinov2_small_focus"
    """Teacher, and what every student starts from."""
    backbone_weights: Path | None = None
    """Its local weights."""
    output: Path = Path("outputs/evidence")
    """Where everything goes."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the students. Each seed has its own chain of rounds, and its own order of the scenes in the curve."""
    rounds: int = 3
    """Rounds of lifting and distilling with all scenes, each with the averaged student of the one before as teacher."""
    control_rounds: int = 3
    """Likewise of the controls."""
    kinds: tuple[Kind, ...] = ("lifted", "control", "control-blur", "control-shift")
    """Targets of the students; `lifted` must be among them."""
    curve: tuple[int, ...] = (1, 2, 4)
    """Numbers of scenes, besides all of them, with which students are trained for one round."""
    curve_kinds: tuple[Kind, ...] = ("lifted", "control-shift", "control")
    """Targets of the students of that curve, as far as `kinds` has them."""
    other_steps: tuple[int, ...] = ()
    """Further lengths of training of `lifted`, one round, all scenes, the first seed."""
    geometry_steps: int = 5000
    """Of splatfacto, for each scene."""
    steps: int | None = None
    """Of distillation, for a trial; as many as the recipe takes if not given."""
    interpolate: float = 0.6
    """Share of the student in the average that teaches the next round."""
    amounts: tuple[float, ...] = (0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
    """Shares of the student that are measured of `lifted`."""
    control_amounts: tuple[float, ...] = (0.4, 0.6, 1.0)
    """Likewise of the controls."""
    held_out_views: int = 12
    """Most held-out views of a scene on which drift, fidelity and match are measured without labels."""
    decays: tuple[float, ...] = (1e-4, 1e-5, 1e-6, 1e-7)
    """Decays of the logistic regression, of which the one that suits the original best on the development frames is
    taken for all."""

    only: tuple[Stage, ...] = ()
    """Make these steps alone; all if not given."""
    pieces: str | None = None
    """Make only the steps in whose names this regular expression is found, as `--plan` prints them. Several commands
    with parts of the steps may run beside each other in one output folder."""
    plan: bool = False
    """Print the steps that are still to be made, with their expected minutes, and stop."""
    jobs: int = 4
    """Students that are trained side by side."""
    scene_jobs: int = 8
    """Scenes that are trained, or lifted, side by side."""
    threads: int = 2
    """Processor threads of each."""
    devices: int = 1
    """GPUs that scenes and students are spread over; what is measured is measured on the first."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
