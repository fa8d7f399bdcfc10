"""The commands, what each reads, and what it is that must come out the same."""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.faults.world import TEACHER, World, values_of

_EVERYTHING = (
    *(
        "encodings.utf_8_sig",
        "nerfstudio.scripts.eval",
        "nerfstudio.scripts.train",
        "nerfstudio.configs.method_configs",
    ),
    *("distill.cli", "distill.session", "fit3d_ns.commands.export.cli", "fit3d_ns.commands.export.trained_run"),
    *("fit3d_ns.commands.export.feature_maps", "fit3d_ns.commands.export.camera_path", "fit3d_ns.commands.lift.cli"),
    *(
        "fit3d_ns.commands.lift.lift_writer",
        "fit3d_ns.commands.lift.sources",
        "fit3d_ns.pipeline",
        "fit3d_ns.runs.bundling",
    ),
    *(
        "fit3d_ns.rasterization.cpu",
        "fit3d_rooms.cli",
        "fit3d_rooms.dataset",
        "probe.cli",
        "probe.run",
        "probe.exact.run",
    ),
)
_NOT_READ = (".html", ".md", ".jsonl", ".csv", ".txt", ".mp4", ".npz")


@dataclass(frozen=True)
class Command:
    """A command in the world."""

    name: str
    """Of the command, unique in the world."""
    call: Callable[[], None]
    """What typing it would do."""
    makes: tuple[str, ...]
    """Globs of the files that are its result, below the root; all else that it writes is on the way."""
    reads: tuple[Path, ...] = ()
    """Files that it reads, relative to the root."""
    restarts: bool = False
    """Whether it is meant to be killed and started again."""
    without: tuple[Path, ...] = ()
    """Files that are removed before a damaged start: where its result is there already, it would refuse."""

    def values(self, world: World) -> dict[str, Any]:
        """Returns its result, by file.

        Args:
            world: In which it ran.
        """
        found = sorted({path for pattern in self.makes for path in world.root.glob(pattern) if path.is_file()})
        return {str(path.relative_to(world.root)): values_of(path) for path in found}


def import_everything() -> None:
    """Imports what any command imports, once, before processes are forked."""
    for module in _EVERYTHING:
        import_module(module)
    import torch

    torch.set_num_threads(1)


def build_world(folder: Path) -> tuple[World, list[Command]]:
    """Makes a world and everything in it, by the commands themselves.

    Args:
        folder: Where.

    Returns:
        The world, and every command with what it reads and makes.
    """
    world = World(folder)
    root, run = world.root, world.run_folder
    b, d, c = root / "b", root / "d", root / "c"
    device = ["--device", "cpu"]
    teacher = ["--backbone", TEACHER, "--backbone-weights", str(root / "teacher.safetensors")]
    distill = ["--bundles", str(b), "--output-dir", str(d), "--cache-dir", str(c), "--steps", "6", "--batch-size", "2"]
    distill += ["--report-views", "3", "--report-scenes", "0", "--save-every", "2", *device]
    probe = ["segmentation", "--data", str(root / "blocks"), "--tuned", str(d), "--device", "cpu", *teacher]
    fast = ["--protocol", "fast", "--iterations", "8", "--batch-size", "2", "--checkpoint-every", "3"]
    rooms = [str(root / "rooms"), "--scenes", "2", "--views", "2", "--width", "48", "--height", "48"]
    lifted = ["--load-config", str(run / "config.yml")]
    averaged = ["--average-only", str(d), "--interpolate", "0.3"]
    averaged += ["--original-weights", str(root / "teacher.safetensors")]
    exported = ["--no-video", "--feature-maps", "--camera-path", str(root / "camera_path.json"), "--overwrite"]

    def fit3d(module: str, words: list[str]) -> Callable[[], None]:
        def call() -> None:
            sys.argv = [module, *words]
            import_module(module).main()

        return call

    calls = {
        "train": lambda: _train(world, resume=False),
        "lift": fit3d("fit3d_ns.commands.lift.cli", lifted),
        "bundle": fit3d(
            "distill.cli", ["--runs", str(root / "out"), "--bundle-dir", str(b), "--bundles-only", *device]
        ),
        "distill": fit3d("distill.cli", [*distill, "--resume"]),
        "probe": fit3d("probe.cli", [*probe, "--output-dir", str(root / "p")]),
        "fast": fit3d("probe.cli", [*probe, *fast, "--output-dir", str(root / "q")]),
        "export": fit3d("fit3d_ns.commands.export.cli", [*lifted, "--output-dir", str(root / "e"), *exported]),
        "rooms": fit3d("fit3d_rooms.cli", rooms),
    }
    for name, call in calls.items():
        world.make(name, call)
    world.keep()
    made = {name: _read_again(paths) for name, paths in world.made.items()}
    scene = [Path("scene", name) for name in ("transforms.json", "sparse_pc.ply")]
    scene += [path.relative_to(root) for path in sorted((world.scene / "images").iterdir())[1:2]]
    weights = [Path("teacher.safetensors")]
    maps = [path for path in made["train"] if ".fit3d_cache" in path.parts]
    trained = [path for path in made["train"] if path.parts[0] == "out"]
    blocks = [Path("blocks", "train", "1.png"), Path("blocks", "trainannot", "1.png")]
    result = [path for path in made["distill"] if path.parts[0] == "d" and len(path.parts) == 2]
    saved = [path for path in made["distill"] if "checkpoints" in path.parts][-1:]
    decoded = [path for path in made["distill"] if path.parts[0] == "c"][:1]
    lifted_files = tuple(str(path) for path in world.made["lift"] if path.suffix in (".ckpt", ".safetensors"))
    commands = [
        Command(
            "train",
            calls["train"],
            ("out/*/fit3d-splat/r/nerfstudio_models/*",),
            (*scene, *weights, *maps),
            True,
            (*trained,),
        ),
        Command(
            "resume",
            lambda: _train(world, resume=True),
            ("out/scene/fit3d-splat/r/*/*7.ckpt",),
            (*trained,),
        ),
        Command("eval", lambda: _eval(world), ("eval.json",), (*trained, *maps, *scene)),
        Command("lift", calls["lift"], lifted_files, (*trained, *maps, *made["lift"]), True),
        Command("bundle", calls["bundle"], ("b/*/*",), (*made["lift"], *made["bundle"]), True),
        Command(
            "distill", calls["distill"], ("d/*.safetensors", "d/card.json"), (*made["bundle"], *decoded, *saved), True
        ),
        Command(
            "average",
            fit3d(
                "distill.cli",
                [
                    "--average-only",
                    str(d),
                    "--interpolate",
                    "0.3",
                    "--original-weights",
                    str(root / "teacher.safetensors"),
                ],
            ),
            ("d/*.safetensors", "d/card.json"),
            (*result,),
        ),
        Command("probe", calls["probe"], ("p/metrics.json",), (*made["probe"], *blocks, *result[:2]), True),
        Command("fast", calls["fast"], ("q/metrics.json",), (*made["fast"],), True),
        Command("export", calls["export"], ("e/*", "e/feature_maps/*"), (*trained, Path("camera_path.json")), True),
        Command("rooms", calls["rooms"], ("rooms/**/*.*",), (Path("rooms", "rooms.json"),), True),
    ]
    return world, commands


def _read_again(paths: list[Path]) -> list[Path]:
    """Of the files that a command made, those that some command reads, the last of each kind in each folder."""
    kinds: dict[tuple, Path] = {}
    for path in paths:
        if path.suffix in _NOT_READ or path.name.startswith("events.out"):
            continue
        stem = path.stem.rstrip("0123456789")
        kinds[path.parent, stem if stem != path.stem or len(stem) < 24 else "", path.suffix] = path
    return sorted(kinds.values())


def _train(world: World, resume: bool) -> None:
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts.train import main

    config: Any = deepcopy(all_methods["fit3d-splat"])
    config.vis, config.timestamp, config.output_dir = "tensorboard", "r", world.root / "out"
    config.viewer.quit_on_train_completion = True
    config.logging.local_writer.enable = False
    config.machine.device_type = "cpu"
    config.steps_per_eval_image = config.steps_per_eval_all_images = 10**6
    config.max_num_iterations, config.steps_per_save, config.save_only_latest_checkpoint = 6, 2, False
    config.data = config.pipeline.datamanager.data = world.scene
    config.pipeline.datamanager.dataparser.eval_mode, config.pipeline.datamanager.dataparser.eval_interval = (
        "interval",
        4,
    )
    config.pipeline.datamanager.backbone = TEACHER
    config.pipeline.datamanager.backbone_weights = world.root / "teacher.safetensors"
    config.pipeline.model.feature_dim, config.pipeline.model.num_downscales = 8, 0
    config.pipeline.model.feature_interval = 1
    saved = sorted((world.run_folder / "nerfstudio_models").glob("step-*.ckpt"))
    if resume or saved:
        if not resume and saved[-1].stem.endswith("5"):
            return  # killed after its last step
        config.load_dir = world.run_folder / "nerfstudio_models"
        config.max_num_iterations = 8 if resume else 6
    main(config)


def _eval(world: World) -> None:
    from nerfstudio.scripts.eval import ComputePSNR

    ComputePSNR(load_config=world.run_folder / "config.yml", output_path=world.root / "eval.json").main()
