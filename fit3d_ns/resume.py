"""Whether a run that is resumed has the configuration that it was trained with."""

from pathlib import Path
from typing import Any, Dict

from nerfstudio.utils.rich_utils import CONSOLE

from fit3d_ns.errors import UserError
from fit3d_ns.runs import find_checkpoint, read_config, run_folder


def check_same_configuration(config: Any) -> None:
    """Compares the flags that decide what a checkpoint holds with those of the run that it belongs to.

    Other flags (the number of steps, logging, the viewer, learning rates) may change.

    Args:
        config: nerfstudio's ``TrainerConfig`` of ``ns-train fit3d-splat``, before it overwrites the earlier one.

    Raises:
        UserError: If there is no checkpoint, or naming the flags that differ and their values.
    """
    wanted = config.load_dir or config.load_checkpoint
    if wanted is None:
        return
    path = run_folder(find_checkpoint(wanted, config.load_step)) / "config.yml"
    if not path.is_file():
        return
    try:
        trained = read_config(path)
    except UserError as error:  # such as the dataparser of another package
        CONSOLE.print(f"[yellow]{error} Whether the flags agree cannot be checked.[/yellow]")
        return
    if not isinstance(trained.pipeline.model, type(config.pipeline.model)):
        return  # the model says what can be done with a run of plain splatfacto
    before, now = _flags(trained.pipeline.model), _flags(config.pipeline.model)
    # What fit3d-lift writes trains neither way.
    free = {"features"} if before["features"] == "joint" and _is_lifted(path.parent) else set()
    differing = [name for name in now if name not in free and before[name] != now[name]]
    if differing:
        changes = ", ".join(f"--pipeline.model.{name} {before[name]} (now {now[name]})" for name in differing)
        raise UserError(f"The run {path.parent} was trained with {changes}: use the same flags, or start a new run.")


def _flags(model: Any) -> Dict[str, Any]:
    """The flags of the model that decide which parameters there are and how they are trained."""
    return {
        "camera-optimizer.mode": model.camera_optimizer.mode,
        "sh-degree": model.sh_degree,
        "use-bilateral-grid": model.use_bilateral_grid,
        "grid-shape": tuple(model.grid_shape),
        "strategy": getattr(model, "strategy", "default"),
        "features": model.features,
        # Which run it was does not matter: the checkpoint holds its geometry, and it may have moved.
        "init-from": "not given" if model.init_from is None else "given",
    }


def _is_lifted(run: Path) -> bool:
    from fit3d_ns.lifting.scene import RECORD

    return (run / RECORD).is_file()
