"""Everything a user can choose about distillation."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fit3d_ns.support.errors import UserError

PAPER_BATCH = 2
"""Views per step in the paper."""
TargetKind = Literal["lifted", "control", "control-blur", "control-shift"]


@dataclass
class DistillConfig:
    """Fine-tunes a 2D backbone on features that were lifted into 3D (FiT3D, stage two).

    Give trained scenes with --runs, or their bundles with --bundles. The result is OUTPUT_DIR/backbone.safetensors, a
    plain timm state dict, with card.json, metrics.json and report.html beside it. How it learns is the --recipe's
    choice; every flag of it that is given wins.
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
    teacher: str | None = None
    """Of --runs, take only features of this backbone: a name, the result folder of the round before, or the name that
    lifts of it carry. Needed where there are features of several."""
    data_root: Path | None = None
    """Folder that holds the scenes' photos, if they moved since the runs were trained."""
    bundle_dir: Path | None = None
    """Where bundles of --runs are written; below each run if not given."""
    bundles_only: bool = False
    """Only make the bundles of --runs."""

    average_only: Path | None = None
    """Do nothing but average a finished result folder anew, with --interpolate: no scenes, no photos, no GPU."""

    recipe: Literal["auto", "paper"] = "auto"
    """`auto`: a rate that falls, an average over the steps and one with the original's weights, as long as the number
    of views asks for; it measured best on up to 800 views. `paper`: FiT3D's own, made for 140,000 views."""
    interpolate: float | None = None
    """Share A of the student in the result, whose weights are A x student + (1 - A) x original; 0 to 1."""

    targets: TargetKind = "lifted"
    """What the student learns: `lifted` features rendered from the scenes, or the teacher's own maps passed through
    the same low-dimensional basis, which have no 3D in them and show what fine-tuning alone does: as they are
    (`control`), blurred as much as lifting blurs (`control-blur`), or averaged over shifted photos (`control-shift`).
    """
    accumulation: Literal["ignore", "weight", "drop"] | None = None
    """Patches where the scene is not opaque: `ignore` that (as FiT3D), `weight` them by opacity, or `drop` those below
    --min-accumulation. The recipe's if not given."""
    min_accumulation: float = 0.5
    """Opacity, in [0, 1], below which `drop` leaves a patch out."""

    student: str | None = None
    """Backbone to fine-tune; the scenes' teacher if not given, or what that was itself fine-tuned from. Its feature
    width must be the teacher's."""
    start_from: Literal["original", "teacher"] = "original"
    """Where the scenes' teacher is itself a student: what the next student starts from."""
    student_weights: Path | None = None
    """Local weights of the student. If not given, the teacher's, or where --student names another backbone, those that
    it is published with."""
    original_weights: Path | None = None
    """Where the scenes' teacher is itself a student, and with --average-only: local weights of what that was fine-tuned
    from, if they are not those that its name stands for."""
    student_layer: int | None = None
    """Block of the student whose output is trained. If not given, the teacher's, or where --student names another
    backbone, its last."""
    lora_rank: int = 0
    """Train only low-rank updates of this rank on every attention layer, at a rate of their own; 0 trains all weights,
    which learns more."""
    ema_decay: float | None = None
    """Take an exponential moving average of the student with this decay per step, such as 0.999; 0 takes the student
    itself. The recipe's if not given."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower. For ViT-L and larger."""

    lr: float | None = None
    """Learning rate of AdamW; the recipe's if not given, as are those that follow."""
    weight_decay: float | None = None
    """Weight decay of AdamW, on all trained weights."""
    clip: float | None = None
    """Largest norm of the gradient; 0 for no limit."""
    batch_size: int | None = None
    """Views per optimizer step, over all processes together."""
    gradient_accumulation: int = 1
    """Parts into which each process cuts its share of the batch, one after the other, to save memory."""
    epochs: float | None = None
    """Passes over all training views."""
    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    schedule: Literal["constant", "cosine"] | None = None
    """Learning rate over steps, after the warm-up; `cosine` falls to zero."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly."""
    flip: float | None = None
    """Share of views that are mirrored, with their target."""
    seed: int = 42
    """Decides the order of the views and which are mirrored."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the student: bf16 autocast on CUDA and fp32 on a CPU by default, fp32 in the paper's recipe.
    Weights, loss and optimizer are always fp32."""
    acceleration: Literal["auto", "none", "compile", "graph"] = "auto"
    """`graph` replays the whole step as one CUDA graph, `compile` also has torch.compile fuse the student's kernels
    (a start of half a minute; in a CUDA graph too on one GPU). By default, on one GPU, `compile` if the views of all
    steps pay for its start, else `graph`; `none` elsewhere. The log says which, and why."""
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
    vis: Literal["none", "tensorboard", "wandb"] = "none"
    """Show curves while it trains, besides OUTPUT_DIR/curves.jsonl."""
    validation_runs: tuple[Path, ...] = ()
    """Runs of scenes that are not trained on, and measured while the student trains."""
    validation_bundles: tuple[Path, ...] = ()
    """The same as scene bundles."""
    validate_every: int = 500
    """Steps between two measurements of the validation scenes."""
    report_views: int = 24
    """Held-out views per scene that are measured before and after, and of a validation scene while it trains."""
    measured_scenes: int = 32
    """Scenes that are measured at the end, evenly spaced among those trained on, and as many validation scenes."""
    report_scenes: int = 6
    """Scenes that the report shows pictures of."""
    half: bool = False
    """Also write backbone_fp16.safetensors, in half precision."""
    dinov2_layout: bool = False
    """Also write backbone_dinov2.safetensors, with the keys of facebookresearch/dinov2 (DINOv2 backbones only)."""
    transformers_layout: bool = False
    """Also write transformers/, a folder that transformers' AutoModel opens (DINOv2 backbones only)."""
    onnx: bool = False
    """Also write backbone.onnx, a graph from images of any size to patch tokens; needs onnx and onnxscript."""
    push_to_hub: Annotated[str | None, tyro.conf.arg(metavar="USER/REPO")] = None
    """Upload the result to this repository of the Hugging Face hub; needs a login."""


_AT_LEAST_ZERO = "lora_rank weight_decay clip warmup_steps seed photo_memory workers report_scenes".split()
_AT_LEAST_ONE = (
    "batch_size gradient_accumulation steps views_per_render render_ahead save_every keep_checkpoints log_every "
    "report_views validate_every measured_scenes"
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
    if config.interpolate is not None:
        from fit3d_ns.backbones.students.averaging import check_amount  # needs torch, which --help does without

        check_amount(config.interpolate)
    batch_size = config.batch_size or (PAPER_BATCH if config.recipe == "paper" else None)
    parts = num_processes * config.gradient_accumulation
    if batch_size is not None and batch_size % parts:
        raise UserError(
            f"--batch-size {batch_size} cannot be cut into {num_processes} processes x "
            f"{config.gradient_accumulation} parts: choose a multiple of {parts}."
        )
    if config.data_root is not None and not config.data_root.is_dir():
        raise UserError(f"--data-root {config.data_root} is no folder: name the one that holds the photos.")
