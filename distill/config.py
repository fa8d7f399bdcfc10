"""Everything a user can choose about distillation; the defaults are the paper's."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fit3d_ns.support.errors import UserError


@dataclass
class DistillConfig:
    """Fine-tunes a 2D backbone on features that were lifted into 3D (FiT3D, stage two).

    Give trained scenes with --runs, or their bundles with --bundles. The result is OUTPUT_DIR/backbone.safetensors, a
    plain timm state dict, with card.json, metrics.json and report.html beside it.
    """

    runs: tuple[Path, ...] = ()
    """Folders below which finished fit3d-splat runs are looked for, or config.yml files of runs."""
    bundles: tuple[Path, ...] = ()
    """Scene bundles, or folders that hold some, made on this or another machine."""
    output_dir: Path = Path("outputs/distill")
    """Where checkpoints and results go."""
    resume: bool = False
    """Go on from the newest checkpoint in --output-dir."""
    all_runs: bool = False
    """Take every run of a scene instead of the newest."""
    data_root: Path | None = None
    """Folder that holds the scenes' photos, if they moved since the runs were trained."""
    bundle_dir: Path | None = None
    """Where bundles of --runs are written; below each run if not given."""
    bundles_only: bool = False
    """Only make the bundles of --runs."""

    targets: Literal["lifted", "control"] = "lifted"
    """What the student learns: `lifted` features rendered from the scenes, or the teacher's own maps passed through
    the same low-dimensional basis (`control`), which has no 3D in it and shows what fine-tuning alone does."""
    accumulation: Literal["ignore", "weight", "drop"] = "weight"
    """Patches where the scene is not opaque: `ignore` that (as FiT3D), `weight` them by opacity, or `drop` those below
    --min-accumulation."""
    min_accumulation: float = 0.5
    """Opacity, in [0, 1], below which `drop` leaves a patch out."""

    student: str | None = None
    """Backbone to fine-tune; the scenes' teacher if not given. Its feature width must be the teacher's."""
    student_weights: Path | None = None
    """Local weights of the student. If not given, the teacher's, or where --student names another backbone, those that
    it is published with."""
    student_layer: int | None = None
    """Block of the student whose output is trained. If not given, the teacher's, or where --student names another
    backbone, its last."""
    lora_rank: int = 0
    """Train only low-rank updates of this rank on every attention layer; 0 trains all weights."""
    ema_decay: float = 0.0
    """Save an exponential moving average of the student with this decay per step, such as 0.999; 0 saves the student
    itself."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower. For ViT-L and larger."""

    lr: float = 1e-5
    """Learning rate of AdamW."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW, on all trained weights."""
    clip: float = 0.1
    """Largest norm of the gradient; 0 for no limit."""
    batch_size: int = 2
    """Views per optimizer step, over all processes together."""
    accumulate: int = 1
    """Parts into which each process cuts its share of the batch, one after the other, to save memory."""
    epochs: float = 1.0
    """Passes over all training views."""
    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over steps, after the warm-up; `cosine` falls to zero."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    flip: float = 0.5
    """Share of views that are mirrored, with their target."""
    seed: int = 42
    """Decides the order of the views and which are mirrored."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the student: bf16 autocast on CUDA and fp32 on a CPU by default. Weights, loss and optimizer are
    always fp32."""
    acceleration: Literal["auto", "none", "compile", "graph"] = "auto"
    """`graph` replays the whole step as one CUDA graph, `compile` also has torch.compile fuse the student's kernels
    (a start of half a minute; in a CUDA graph too on one GPU). By default `graph` on one GPU and `none` elsewhere."""
    scene_placement: Literal["auto", "device", "host", "disk"] = "auto"
    """Where scenes wait: all on the GPU, or in pinned host memory or on disk with uploads ahead of their use."""
    scene_memory: float | None = None
    """GPU memory for scenes in GB; 55 % of what is free if not given."""
    photo_memory: float | None = None
    """GPU memory in GB for decoded photos and for targets that are kept; 15 % of what is free if not given.
    What does not fit is read from the cache, or rendered again, each time."""
    views_per_render: int = 8
    """Most views of a scene that are rendered at once."""
    render_ahead: int = 64
    """Views whose targets are rendered together, ahead of their use, so that views of one scene share a call."""
    workers: int = 0
    """Threads that decode and read photos; as many as the processor has, at most 16, if 0."""
    cache_dir: Path | None = None
    """Where decoded photos are kept, at the student's resolution; the user's cache folder if not given."""

    save_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    log_every: int = 10
    """Steps between two points of the loss curve."""
    report_views: int = 24
    """Held-out views per scene that are measured before and after."""
    report_scenes: int = 6
    """Scenes that the report shows pictures of."""
    half: bool = False
    """Also write backbone_fp16.safetensors, in half precision."""
    dinov2_layout: bool = False
    """Also write backbone_dinov2.safetensors, with the keys of facebookresearch/dinov2 (DINOv2 backbones only)."""
    push_to_hub: Annotated[str | None, tyro.conf.arg(metavar="USER/REPO")] = None
    """Upload the result to this repository of the Hugging Face hub; needs a login."""


_AT_LEAST_ZERO = "lora_rank weight_decay clip warmup_steps seed photo_memory workers report_scenes".split()
_AT_LEAST_ONE = (
    "batch_size accumulate steps views_per_render render_ahead save_every keep_checkpoints log_every report_views"
).split()
_ABOVE_ZERO = "lr epochs scene_memory".split()
_SHARES = "min_accumulation flip".split()


def check_choices(config: DistillConfig, num_processes: int) -> None:
    """Refuses choices that make no sense.

    Args:
        config: The user's choices.
        num_processes: Processes that share a batch.

    Raises:
        UserError: If one is out of its range, or a batch cannot be cut evenly.
    """
    ranges = {
        **{name: (0.0, math.inf, "at least 0") for name in _AT_LEAST_ZERO},
        **{name: (1.0, math.inf, "at least 1") for name in _AT_LEAST_ONE},
        **{name: (math.ulp(0.0), math.inf, "a number above 0") for name in _ABOVE_ZERO},
        **{name: (0.0, 1.0, "0 to 1") for name in _SHARES},
        "ema_decay": (0.0, math.nextafter(1.0, 0.0), "0 to below 1"),
    }
    for name, (lowest, highest, wanted) in ranges.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and lowest <= value <= highest):
            raise UserError(f"--{name.replace('_', '-')} {value}: give {wanted}.")
    parts = num_processes * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be cut into {num_processes} processes x {config.accumulate} "
            f"parts: choose a multiple of {parts}."
        )
    if config.data_root is not None and not config.data_root.is_dir():
        raise UserError(f"--data-root {config.data_root} is no folder: name the one that holds the photos.")
