"""All heads of a table, trained at once on the same features, each as if it were alone."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.console import rank
from fit3d_ns.support.errors import DamagedFile, UserError, first_line
from fit3d_ns.support.files import atomic_path
from fit3d_ns.support.processes import average_gradients, gather_objects, wait_for_all
from fit3d_ns.support.tensor_files import is_finite
from fit3d_ns.support.torch_files import read_torch
from probe.features.rows import Row, row_features, row_width
from probe.heads import LossFunction
from probe.protocols import Optimization
from probe.tasks.task import Task

_COSINE_END = 1e-8
_BETA1_HIGH, _BETA1_LOW, _BETA1_TURN = 0.95, 0.85, 0.3


def learning_rate_factor(optimization: Optimization, step: int) -> float:
    """Returns what a head's learning rate is multiplied with.

    Args:
        optimization: The recipe's.
        step: From 0; ``optimization.iterations - 1`` is the last.

    Returns:
        In (0, 1].
    """
    share = step / optimization.iterations
    if optimization.schedule == "poly":
        factor = 1.0 - share
    else:
        factor = _cosine(1.0, _COSINE_END, share)
    warmup = optimization.warmup_share * optimization.iterations
    if step < warmup:
        factor *= 1.0 - (1.0 - step / warmup) * (1.0 - optimization.warmup_ratio)
    return factor


def first_beta(optimization: Optimization, step: int) -> float:
    """Returns Adam's first beta at a step: .9, or one cycle with cosines, as mmcv's OneCycle hook for momentum.

    Args:
        optimization: Says whether it cycles, and the number of steps.
        step: From 0.
    """
    if not optimization.beta1_cycle:
        return 0.9
    turn = _BETA1_TURN * optimization.iterations - 1
    end = optimization.iterations - 1
    if step <= turn:
        return _cosine(_BETA1_HIGH, _BETA1_LOW, step / max(turn, 1e-9))
    return _cosine(_BETA1_LOW, _BETA1_HIGH, (step - turn) / max(end - turn, 1e-9))


def _cosine(start: float, end: float, share: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


@dataclass
class Head:
    """A head in training."""

    row: Row
    """Of the table."""
    learning_rate: float
    """Peak."""
    module: nn.Module
    """On the device."""
    optimizer: torch.optim.Optimizer
    """Of the module alone."""

    @property
    def key(self) -> str:
        """Name among all heads."""
        return f"{self.row.name}@{self.learning_rate:g}"


class HeadTrainer:
    """One head for each row and learning rate."""

    def __init__(
        self,
        task: Task,
        rows: Sequence[Row],
        optimization: Optimization,
        widths: tuple[int, int],
        seed: int,
        device: torch.device,
    ) -> None:
        """Makes the heads.

        Args:
            task: Knows their kind.
            rows: Of the table.
            optimization: Learning rates and the rest.
            widths: Channels of a backbone's patch tokens and of its class token (0: none).
            seed: Each head's weights depend on it and on the head's shape alone, so rows of one width start as one.
            device: Where.
        """
        self._optimization = optimization
        self.heads: list[Head] = []
        for row in rows:
            for learning_rate in optimization.learning_rates:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(_stable_seed(seed, row_width(row, widths[0]), row.assembly == "linear"))
                    module = task.make_head(row_width(row, widths[0]), widths[1], row.assembly == "linear").to(device)
                optimizer = torch.optim.AdamW(
                    module.parameters(),
                    learning_rate,
                    betas=(0.9, 0.999),
                    weight_decay=optimization.weight_decay,
                    fused=device.type == "cuda" or None,
                )
                self.heads.append(Head(row, learning_rate, module.train(), optimizer))

    def step(self, step: int, features: dict[str, BackboneOutput], loss: LossFunction) -> list[Tensor]:
        """Takes one step with every head: its own loss, gradient, clipping and update.

        Args:
            step: From 0.
            features: By backbone.
            loss: Returns the loss of a head on assembled features.

        Returns:
            The losses, detached, in the order of ``heads``.
        """
        factor, beta = learning_rate_factor(self._optimization, step), first_beta(self._optimization, step)
        losses: list[Tensor] = []
        assembled_row, assembled = None, None
        for head in self.heads:
            if assembled is None or head.row != assembled_row:
                assembled_row, assembled = head.row, row_features(head.row, features)
            value = loss(head.module, assembled)
            head.optimizer.zero_grad(set_to_none=True)
            value.backward()
            average_gradients(head.module.parameters())
            if self._optimization.clip is not None:
                nn.utils.clip_grad_norm_(head.module.parameters(), self._optimization.clip)
            for group in head.optimizer.param_groups:
                group["lr"] = head.learning_rate * factor
                group["betas"] = (beta, group["betas"][1])
            head.optimizer.step()
            losses.append(value.detach())
        return losses

    def save(self, path: Path, step: int, fingerprint: str) -> None:
        """Writes everything that a resumed training needs; the first process does.

        Args:
            path: Of the checkpoint.
            step: The next one.
            fingerprint: Of the settings.
        """
        if rank() == 0:
            state = {
                "step": step,
                "fingerprint": fingerprint,
                "heads": {head.key: head.module.state_dict() for head in self.heads},
                "optimizers": {head.key: head.optimizer.state_dict() for head in self.heads},
            }
            with atomic_path(path) as temporary:
                torch.save(state, temporary)
        wait_for_all()

    def load(self, path: Path, fingerprint: str, device: torch.device) -> int:
        """Reads what `save` wrote.

        Args:
            path: Of the checkpoint.
            fingerprint: Of the settings.
            device: Of the heads.

        Returns:
            The step to go on with; 0 if there is no such file, or it belongs to other settings.

        Raises:
            UserError: If the file is damaged.
        """
        if not path.is_file():
            return 0
        try:
            state: dict[str, Any] = read_torch(path, device=device)
            _check_finite(state)
            if state["fingerprint"] != fingerprint:
                return 0
            for head in self.heads:
                head.module.load_state_dict(state["heads"][head.key])
                saved = state["optimizers"][head.key]
                for group, own in zip(saved["param_groups"], head.optimizer.param_groups):
                    group["fused"] = own["fused"]  # that of this device, not of the one it was saved on
                head.optimizer.load_state_dict(saved)
            return int(state["step"])
        except Exception as error:  # torch.load raises half a dozen kinds on damaged files
            raise UserError(
                f"The checkpoint {path} is damaged ({first_line(error)}): delete it to start anew."
            ) from None


def _check_finite(value: Any) -> None:
    if isinstance(value, Tensor) and not is_finite(value):
        raise DamagedFile("it holds NaN or infinite values")
    for item in value.values() if isinstance(value, dict) else ():
        _check_finite(item)


def mean_losses(trainer: HeadTrainer, losses: list[Tensor]) -> dict[str, float]:
    """Returns the losses by head, averaged over processes; waits for the device.

    Args:
        trainer: Whose heads they are.
        losses: One for each head, on the device.
    """
    values = torch.stack(losses).tolist()
    everywhere = gather_objects(values)
    return {head.key: sum(one[k] for one in everywhere) / len(everywhere) for k, head in enumerate(trainer.heads)}


def _stable_seed(seed: int, width: int, fuse: bool) -> int:
    digest = hashlib.blake2b(f"{seed}|{width}|{fuse}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")
