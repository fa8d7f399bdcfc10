"""Losses on the way: lines of JSON always, TensorBoard or Weights & Biases if asked for."""

import json
from pathlib import Path
from typing import Any, Literal, Optional

from fit3d_ns.errors import UserError
from probe.distributed import rank


class LossLog:
    """Writes losses of the first process; the file may be appended to by a resumed run."""

    def __init__(self, folder: Path, vis: Literal["none", "tensorboard", "wandb"], config: dict[str, Any]) -> None:
        """Opens what is asked for.

        Args:
            folder: The run's.
            vis: Besides losses.jsonl.
            config: Shown beside the run, in Weights & Biases.

        Raises:
            UserError: If a tool is not installed.
        """
        self._path = folder / "losses.jsonl"
        self._board: Optional[Any] = None
        self._run: Optional[Any] = None
        if rank():
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if vis == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"))
            elif vis == "wandb":
                import wandb  # type: ignore[import-not-found]

                self._run = wandb.init(project="fit3d-probe", dir=str(folder), config=config)
        except ImportError:
            raise UserError(f"--vis {vis} needs the package {vis}: install it with pip.") from None

    def write(self, seed: int, step: int, losses: dict[str, float]) -> None:
        """Adds the losses of a step, by head."""
        if rank():
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"seed": seed, "step": step, **losses}) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write {self._path} ({error.strerror}): free space there.") from None
        for name, value in losses.items():
            if self._board is not None:
                self._board.add_scalar(f"loss/seed_{seed}/{name}", value, step)
        if self._run is not None:
            # Steps of their own: those of Weights & Biases only ever grow, and each seed begins anew.
            self._run.define_metric(f"loss/seed_{seed}/*", step_metric=f"step/seed_{seed}")
            values = {f"loss/seed_{seed}/{name}": value for name, value in losses.items()}
            self._run.log({**values, f"step/seed_{seed}": step})

    def close(self) -> None:
        """Ends what was opened."""
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()
