"""The commands, and what it is that must come out the same."""

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.faults.reading import one_of_each_kind
from benchmarks.faults.server import warm_server
from benchmarks.faults.world import TEACHER, World, values_of

_EVERYTHING = (
    *("encodings.utf_8_sig", "nerfstudio.scripts.eval", "distill.cli", "distill.session", "fit3d_loop.loop"),
    *("fit3d_ns.commands.export.cli", "fit3d_ns.commands.export.trained_run", "fit3d_ns.commands.export.feature_maps"),
    *("fit3d_ns.commands.export.camera_path", "fit3d_ns.commands.lift.cli", "fit3d_ns.commands.lift.lift_writer"),
    *("fit3d_ns.pipeline", "fit3d_rooms.cli", "fit3d_rooms.dataset", "fit3d_rooms.room"),
    *("probe.cli", "probe.run", "probe.exact.run", "probe.zero_shot.retrieval", "probe.zero_shot.correspondence"),
)


@dataclass(frozen=True)
class Recipe:
    """How a command is called."""

    name: str
    """In tables, and for --only."""
    call: Callable[[], None]
    """What typing it would do."""
    makes: tuple[str, ...]
    """Globs of the files that are its result, below the root; all else that it writes is on the way."""
    restarts: int = 0
    """How often it is drawn to be killed and started again, relative to others; 0 for never."""
    damages: float = 1.0
    """How often it is drawn to read something damaged, relative to others; less where it takes long."""
    anew: bool = False
    """Whether what it made is removed before a damaged start: where its result is there already, it would refuse."""
    alone: bool = False
    """Whether nothing that later commands need is made by it."""
    apart: bool = False
    """Whether it changes what others made, so that no other may find its result."""


@dataclass(frozen=True)
class Command(Recipe):
    """A command in a world where it was run."""

    first: tuple[dict[str, Any], float] = ({}, 0.0)
    """Its result when it starts from nothing, and the seconds that it takes."""
    second: dict[str, Any] | None = None
    """Its result when it is started again where it has been; None where it is not meant to be."""
    inputs: tuple[Path, ...] = ()
    """One of each kind of file that it reads when it starts from nothing, relative to the root."""
    found: tuple[Path, ...] = ()
    """The same when it is started again."""

    def values(self, world: World) -> dict[str, Any]:
        """Returns its result, by file.

        Args:
            world: In which it was run.
        """
        return _values(self.makes, world)


def import_everything() -> None:
    """Imports and compiles what any command does, once, before processes are forked."""
    import torch

    from fit3d_loop.commands import preload  # noqa: F401

    for module in _EVERYTHING:
        import_module(module)
    torch.set_num_threads(1)


def build_world(folder: Path, names: Sequence[str] = ()) -> tuple[World, list[Command]]:
    """Makes a world and everything in it, by the commands themselves.

    Args:
        folder: Where.
        names: Of the commands that are asked for; all if none is.

    Returns:
        The world, kept, and the commands that were asked for.
    """
    world = World(folder)
    warm_server()
    first, inputs, done = {}, {}, []
    for recipe in recipes_of(world):
        if recipe.alone and names and recipe.name not in names:
            continue
        done.append(recipe)
        if not recipe.apart:
            before = set(world.files())
            ended, read = world.make(recipe.name, recipe.call)
            first[recipe.name] = _values(recipe.makes, world), ended.seconds
            inputs[recipe.name] = one_of_each_kind(read & before)
    world.keep()
    commands = []
    for recipe in done:
        if names and recipe.name not in names:
            continue
        second, found = None, []
        if not recipe.anew:
            before = set(world.files())
            _, read = world.watch(recipe.name, recipe.call)
            second, found = _values(recipe.makes, world), one_of_each_kind(read & before)
            world.restore()
        done_first = first.get(recipe.name, ({}, 0.0))
        read_first = tuple(inputs.get(recipe.name, ()))
        commands.append(Command(**vars(recipe), first=done_first, second=second, inputs=read_first, found=tuple(found)))
    return world, commands


def recipes_of(world: World) -> list[Recipe]:
    """Returns every command, in an order in which each finds what it needs.

    Args:
        world: With nothing but inputs.
    """
    root, run = world.root, world.run_folder
    weights, scene, blocks = str(root / "teacher.safetensors"), str(world.scene), str(root / "blocks")
    device, teacher = ["--device", "cpu"], ["--backbone", TEACHER, "--backbone-weights", weights]
    b, d = str(root / "b"), str(root / "d")
    training = ["--cache-dir", str(root / "c"), "--steps", "6", "--batch-size", "2", "--report-views", "3"]
    training += ["--report-scenes", "0", "--save-every", "2", "--resume", *device]
    bundling = ["--bundles-only", *device]
    probed = ["--data", blocks, *device, *teacher, "--tuned", d]
    both = [str(root / "d2")]
    fast = ["--protocol", "fast", "--iterations", "8", "--batch-size", "2", "--checkpoint-every", "3"]
    rooms = [str(root / "rooms"), "--scenes", "2", "--views", "2", "--width", "48", "--height", "48"]
    lifted, lift = ["--load-config", str(run / "config.yml")], run / "lifts" / "fit3d-splat" / TEACHER
    exported = ["--no-video", "--camera-path", str(root / "camera_path.json"), "--overwrite"]
    averaged = ["--average-only", d, "--interpolate", "0.3", "--original-weights", weights]
    ply = ["--ply", str(root / "e" / "splat.ply"), "--data", scene, "--feature-dim", "8", *teacher]
    loop = ["--engine", "processes", "--threads", "1", *teacher, "--distill-flags=--steps 6 --save-every 2"]
    loop += ["--lift-flags=--feature-dim 8", "--geometry-steps", "10"]
    loop += ["--geometry-flags=--pipeline.model.feature-dim 8 --pipeline.model.num-downscales 0 --steps-per-save 4"]
    probes = ["--probe-data", blocks, "--probe-tasks", "segmentation", "--controls", "control"]
    students = ("{}/*.safetensors", "{}/card.json")

    def typed(module: str, *words: str) -> Callable[[], None]:
        def call() -> None:
            sys.argv = [module, *words]
            import_module(module).main()

        return call

    def into(folder: str) -> list[str]:
        return ["--output-dir", str(root / folder)]

    def in_folder(folder: str) -> tuple[str, ...]:
        return tuple(pattern.format(folder) for pattern in students)

    export, lifter, loops = "fit3d_ns.commands.export.cli", "fit3d_ns.commands.lift.cli", "fit3d_loop.cli"
    models = "{}/scene/fit3d-splat/r/nerfstudio_models/*"
    return [
        Recipe("train", lambda: _train(world, 6), (models.format("out"),), 3, anew=True),
        Recipe("lift", typed(lifter, *lifted), ("out/**/lifts/**/*.ckpt", "out/**/lifts/**/*.safetensors"), 4),
        Recipe(
            "bundle", typed("distill.cli", "--runs", str(root / "out"), "--bundle-dir", b, *bundling), ("b/*/*",), 4
        ),
        Recipe(
            "export", typed(export, *lifted, *into("e"), *exported, "--feature-maps"), ("e/*", "e/feature_maps/*"), 4
        ),
        Recipe("ply", typed(lifter, *ply, *into("o")), ("o/**/*.ckpt", "o/**/*.safetensors"), 4),
        Recipe("distill", typed("distill.cli", "--bundles", b, *into("d"), *training), in_folder("d"), 4),
        Recipe("colmap", lambda: _train(world, 2, "colmap.bin"), (models.format("out.bin"),), anew=True),
        Recipe(
            "colmap-text", lambda: _train(world, 2, "colmap.txt"), (models.format("out.txt"),), anew=True, alone=True
        ),
        Recipe(
            "bundle-colmap",
            typed("distill.cli", "--runs", str(root / "out.bin"), "--bundle-dir", str(root / "b2"), *bundling),
            ("b2/*/*",),
        ),
        Recipe(
            "validate",
            typed(
                "distill.cli",
                "--bundles",
                b,
                "--validation-bundles",
                str(root / "b2"),
                "--validate-every",
                "2",
                *into("d2"),
                *training,
                "--seed",
                "1",
            ),
            in_folder("d2"),
            2,
        ),
        Recipe("probe", typed("probe.cli", "segmentation", *probed, *both, *into("p")), ("p/metrics.json",), 4),
        Recipe("depth", typed("probe.cli", "depth", *probed, *into("pd")), ("pd/metrics.json",), 1, alone=True),
        Recipe(
            "fast", typed("probe.cli", "segmentation", *probed, *fast, *into("q")), ("q/metrics.json",), 4, alone=True
        ),
        Recipe(
            "retrieval",
            typed("probe.cli", "retrieval", *probed, "--class-names", str(root / "names.txt"), *into("pr")),
            ("pr/metrics.json",),
            1,
            alone=True,
        ),
        Recipe(
            "correspondence",
            typed("probe.cli", "correspondence", *probed, "--data", scene, "--pairs-per-bin", "1", *into("pc")),
            ("pc/metrics.json",),
            1,
            alone=True,
        ),
        Recipe("rooms", typed("fit3d_rooms.cli", *rooms), ("rooms/**/*.*",), 1, 0.3, alone=True),
        Recipe(
            "fit3d",
            typed(loops, str(root / "scenes.yaml"), *into("f"), *loop, "--rounds", "2"),
            in_folder("f"),
            2,
            0.6,
            alone=True,
        ),
        Recipe(
            "fit3d-runs",
            typed(loops, str(root / "scenes.txt"), *into("g"), *loop, "--rounds", "1", *probes),
            (*in_folder("g"), "g/probes/*/metrics.json"),
            2,
            0.6,
            alone=True,
        ),
        Recipe("eval", lambda: _eval(world, run), ("eval.json",), alone=True),
        Recipe("eval-lift", lambda: _eval(world, lift), ("eval.json",), alone=True),
        Recipe(
            "export-lift",
            typed(export, "--load-config", str(lift / "config.yml"), *into("el"), *exported),
            ("el/*",),
            alone=True,
        ),
        Recipe("average", typed("distill.cli", *averaged), in_folder("d"), alone=True, apart=True),
        Recipe("resume", lambda: _train(world, 8), ("out/scene/fit3d-splat/r/*/*7.ckpt",), alone=True, apart=True),
        Recipe(
            "init",
            lambda: _train(world, 2, out="out.init", init=run),
            (models.format("out.init"),),
            anew=True,
            alone=True,
        ),
    ]


def _values(patterns: Sequence[str], world: World) -> dict[str, Any]:
    found = sorted({path for pattern in patterns for path in world.root.glob(pattern) if path.is_file()})
    return {str(path.relative_to(world.root)): values_of(path) for path in found}


def _train(world: World, steps: int, scene: str = "scene", out: str | None = None, init: Path | None = None) -> None:
    """``ns-train fit3d-splat``; from the newest checkpoint where there is one."""
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts.train import main

    config: Any = deepcopy(all_methods["fit3d-splat"])
    datamanager, model = config.pipeline.datamanager, config.pipeline.model
    config.vis, config.timestamp, config.experiment_name = "tensorboard", "r", "scene"
    config.output_dir = world.root / (out or scene.replace("scene", "out").replace("colmap", "out"))
    config.viewer.quit_on_train_completion = True
    config.logging.local_writer.enable = False
    config.machine.device_type = "cpu"
    config.steps_per_eval_image = config.steps_per_eval_all_images = 10**6
    config.max_num_iterations, config.steps_per_save, config.save_only_latest_checkpoint = steps, 2, False
    config.data = datamanager.data = world.root / scene
    if scene.startswith("colmap"):
        from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig

        datamanager.dataparser = ColmapDataParserConfig(colmap_path=Path("sparse/0"), downscale_factor=1)
    datamanager.dataparser.eval_mode, datamanager.dataparser.eval_interval = "interval", 4
    datamanager.backbone, datamanager.backbone_weights = TEACHER, world.root / "teacher.safetensors"
    model.feature_dim, model.num_downscales, model.feature_interval, model.init_from = 8, 0, 1, init
    saved = sorted(config.get_checkpoint_dir().glob("step-*.ckpt"))
    if saved:
        if saved[-1].stem.endswith(str(steps - 1)):
            return  # killed after its last step
        config.load_dir = config.get_checkpoint_dir()
    main(config)


def _eval(world: World, run: Path) -> None:
    from nerfstudio.scripts.eval import ComputePSNR

    ComputePSNR(load_config=run / "config.yml", output_path=world.root / "eval.json").main()
