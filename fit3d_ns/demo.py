"""``make demo``: a room, its features lifted into a splat, and a report to look at."""

import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fit3d_ns.backbones import BackboneSpec, weights_available
from fit3d_ns.command_line import run_command
from fit3d_ns.files import atomic_write_json
from fit3d_ns.pca import ColorBasis
from fit3d_ns.report import Report
from fit3d_ns.rooms.cli import RoomsConfig, make_rooms

CONSOLE = Console()


@dataclass
class Demo:
    """Makes a room, lifts a backbone's features into it and writes a report with pictures."""

    output_dir: Path = Path("outputs/demo")
    """Where the room, the run and the report go."""
    steps: Optional[int] = None
    """Training steps; by default 600 without a GPU and 7000 with one."""
    views: int = 40
    """Views of the room."""
    backbone: Optional[str] = None
    """Teacher; by default dinov2_small if its weights can be had, else dinov2_small_focus."""
    seed: int = 1
    """Seed of the room and of the training."""


def main() -> None:
    """Command line of the demo."""
    run_command(lambda: run_demo(tyro.cli(Demo)))


def run_demo(demo: Demo) -> None:
    """Runs the demo from beginning to end.

    Raises:
        UserError: If the output folder or the installation cannot be used.
    """
    cuda = torch.cuda.is_available()
    steps = demo.steps or (7000 if cuda else 600)
    backbone = demo.backbone or _choose_backbone()
    start = time.perf_counter()
    room = make_rooms(RoomsConfig(out=demo.output_dir / "rooms", scenes=1, views=demo.views, seed=demo.seed))[0]
    CONSOLE.print(f"Training {steps} steps on {'the GPU' if cuda else 'the CPU'}, teacher {backbone}.")
    trainer = _set_up(demo, room, backbone, steps, cuda)
    curves = _train(trainer, steps)
    metrics = trainer.pipeline.get_average_eval_image_metrics()
    metrics = {name: value for name, value in metrics.items() if name not in ("num_rays_per_sec", "fps")}
    config_path = trainer.base_dir / "config.yml"
    seconds = time.perf_counter() - start
    summary = {
        "backbone": backbone,
        "device": "cuda" if cuda else "cpu",
        "steps": steps,
        "gaussians": trainer.pipeline.model.num_points,
        "seconds": seconds,
        "config": str(config_path),
        **metrics,
    }
    atomic_write_json(demo.output_dir / "metrics.json", summary)
    _write_report(demo.output_dir / "report.html", trainer, summary, curves)
    CONSOLE.print(f"Report:  {demo.output_dir / 'report.html'}  ({seconds:.0f} s)", highlight=False)
    CONSOLE.print(f"Viewer:  .venv/bin/ns-viewer --load-config {config_path}", highlight=False, soft_wrap=True)


def _choose_backbone() -> str:
    if weights_available(BackboneSpec("dinov2_small"), reach_network=True):
        return "dinov2_small"
    CONSOLE.print(
        "[yellow]DINOv2-S weights are neither cached nor reachable: the demo uses dinov2_small_focus, a DINOv2-S whose "
        "author tuned it for saliency, cut to its first 9 blocks.[/yellow]"
    )
    return "dinov2_small_focus"


def _set_up(demo: Demo, room: Path, backbone: str, steps: int, cuda: bool) -> Any:
    """Returns a trainer as ``ns-train fit3d-splat`` would build it, with settings for a short run on small photos."""
    from nerfstudio.scripts.train import _set_random_seed

    from fit3d_ns.config import fit3d_splat

    config: Any = deepcopy(fit3d_splat.config)
    config.output_dir = demo.output_dir / "runs"
    config.set_timestamp()
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    config.logging.local_writer.enable = False
    config.max_num_iterations = steps
    config.steps_per_save = config.steps_per_eval_image = config.steps_per_eval_all_images = steps + 1
    config.machine.seed = demo.seed
    config.pipeline.datamanager.data = room
    dataparser = config.pipeline.datamanager.dataparser
    dataparser.eval_mode, dataparser.eval_interval = "interval", 5
    config.pipeline.datamanager.backbone = backbone
    config.optimizers["means"]["scheduler"].max_steps = steps
    model = config.pipeline.model
    model.background_color = "black"
    model.num_downscales = 0
    if not cuda:  # small photos and few steps: densify early, and not beyond what a CPU renders quickly
        model.sh_degree = 1
        model.feature_interval = 2
        model.warmup_length = 200
        model.stop_split_at = steps * 6 // 10
        model.reset_alpha_every = 10**6
    config.save_config()
    _set_random_seed(demo.seed)
    trainer = config.setup()
    trainer.setup()
    trainer.pipeline.model.strategy.verbose = False
    return trainer


def _train(trainer: Any, steps: int) -> Dict[str, Tuple[List[float], List[float]]]:
    """Trains with a progress bar; returns curves over steps, measured on one held-out view."""
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation

    curves: Dict[str, Tuple[List[float], List[float]]] = {"psnr": ([], []), "feature_cosine": ([], [])}
    pipeline = trainer.pipeline
    every = max(steps // 25, 1)
    pipeline.datamanager.teacher_map("train", 0)  # fills the cache, under its own progress bar

    def measure(step: int) -> None:
        progress.update(task, completed=step + 1)
        if step % every and step != steps - 1:
            return
        pipeline.eval()
        camera, batch = pipeline.datamanager.evaluation_view(0)
        metrics, _ = pipeline.model.get_image_metrics_and_images(pipeline.model.get_outputs_for_camera(camera), batch)
        pipeline.train()
        for name, (xs, ys) in curves.items():
            xs.append(step + 1)
            ys.append(metrics[name])

    trainer.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], measure))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=CONSOLE) as progress:
        task = progress.add_task("Training", total=steps)
        trainer.train()
    return curves


@torch.no_grad()
def _write_report(path: Path, trainer: Any, summary: Dict[str, Any], curves: Dict[str, Any]) -> None:
    """Writes the page: held-out views, numbers, curves, commands."""
    pipeline = trainer.pipeline
    pipeline.eval()
    model = pipeline.model
    views = list(pipeline.datamanager.fixed_indices_eval_dataloader)
    teachers = [batch["teacher"].float() for _, batch in views]
    basis = ColorBasis.fit(torch.cat([teacher.flatten(1).T for teacher in teachers]))
    report = Report("Features lifted into a room")
    report.add_text(
        f"A procedural room, its photos seen one by one by {summary['backbone']} (the teacher), and a Gaussian splat "
        f"that had to explain all of them at once: {summary['gaussians']:,} Gaussians, {summary['steps']} steps on the "
        f"{summary['device'].upper()}, {summary['seconds']:.0f} seconds in all. Every view below was held out."
    )
    report.add_heading("Held-out views")
    report.add_text(
        "Teacher and lifted features are shown by their first three principal components, in one basis for all "
        "pictures: the same colour means the same feature. Lifted features follow surfaces instead of the picture."
    )
    shown = range(0, len(views), max(len(views) // 4, 1))  # spread over the walk through the room
    for (camera, batch), teacher in ((views[index], teachers[index]) for index in shown):
        outputs = model.get_outputs_for_camera(camera)
        depth = outputs["depth"][..., 0]
        near, far = torch.quantile(depth, torch.tensor([0.02, 0.98], device=depth.device))
        report.add_pictures(
            [
                ("photo", model.composite_with_background(model.get_gt_img(batch["image"]), outputs["background"])),
                ("render", outputs["rgb"]),
                ("teacher", basis.to_rgb(teacher.permute(1, 2, 0))),
                ("lifted", basis.to_rgb(model.decode_view(camera).permute(1, 2, 0))),
                ("depth", 1 - ((depth - near) / (far - near)).clamp(0, 1)),
            ]
        )
    report.add_heading("Numbers, on all held-out views")
    explanations = {
        "psnr": "colour, in dB",
        "ssim": "colour, structural similarity",
        "lpips": "colour, perceptual distance (lower is better)",
        "feature_l1": "lifted against the teacher's own map (lower is better)",
        "feature_cosine": "lifted against the teacher's own map",
        "view_match_teacher": "points that the teacher's features find again in another view",
        "view_match_lifted": "points that the lifted features find again in another view",
    }
    rows = [(name, summary[name], text) for name, text in explanations.items() if name in summary]
    report.add_table(rows, header=("metric", "value", "meaning"))
    report.add_heading("While training, on one held-out view")
    report.add_curve("Colour", {"PSNR": curves["psnr"]}, "step", "dB")
    report.add_curve("Features", {"cosine to the teacher": curves["feature_cosine"]}, "step", "cosine")
    report.add_heading("Look around")
    report.add_code(f".venv/bin/ns-viewer --load-config {summary['config']}")
    report.write(path)


if __name__ == "__main__":
    main()
