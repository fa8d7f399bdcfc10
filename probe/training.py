"""All heads of a table, trained at once on the same features, each as if it were alone."""

import hashlib
import math
from collections.abc import Iterator, Sequence
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
from probe.protocols import Optimization
from probe.stacks import HeadStack, StackLoss, shape_of
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
    """On the device; its parameters are a part of a stack's."""

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
        shapes: dict[tuple, list[list[Head]]] = {}
        for row in rows:
            heads = []
            for learning_rate in optimization.learning_rates:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(_stable_seed(seed, row_width(row, widths[0]), row.assembly == "linear"))
                    module = task.make_head(row_width(row, widths[0]), widths[1], row.assembly == "linear").to(device)
                heads.append(Head(row, learning_rate, module.train()))
            shapes.setdefault(shape_of(heads[0].module), []).append(heads)
        self._by_shape = list(shapes.values())
        self.heads: list[Head] = [head for stack in self._by_shape for heads in stack for head in heads]
        """Those of one shape beside each other."""
        self._stacks = [HeadStack([[head.module for head in heads] for heads in stack]) for stack in self._by_shape]
        rates = range(len(optimization.learning_rates))
        self._parameters = [
            [value for stack in self._stacks for value in stack.by_rate[rate].values()] for rate in rates
        ]
        self._optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in self._parameters],
            betas=(0.9, 0.999),
            weight_decay=optimization.weight_decay,
            fused=device.type == "cuda" or None,
        )

    def step(self, step: int, features: dict[str, BackboneOutput], losses: StackLoss) -> Tensor:
        """Takes one step with every head: its own loss, gradient, clipping and update.

        Args:
            step: From 0.
            features: By backbone.
            losses: Returns the loss of each head from its outputs.

        Returns:
            The losses [H], detached, in the order of ``heads``.
        """
        factor, beta = learning_rate_factor(self._optimization, step), first_beta(self._optimization, step)
        values = losses(
            [
                output
                for stack, of_shape in zip(self._stacks, self._by_shape)
                for output in stack.outputs([row_features(heads[0].row, features) for heads in of_shape])
            ]
        )
        self._optimizer.zero_grad(set_to_none=True)
        values.sum().backward()
        average_gradients([value for parameters in self._parameters for value in parameters])
        if self._optimization.clip is not None:
            for stack in self._stacks:
                stack.clip_gradients(self._optimization.clip)
        for group, learning_rate in zip(self._optimizer.param_groups, self._optimization.learning_rates):
            group["lr"] = learning_rate * factor
            group["betas"] = (beta, group["betas"][1])
        self._optimizer.step()
        return values.detach()

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
                "optimizers": self._optimizer_states(),
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
            self._load_optimizer(state["optimizers"])
            return int(state["step"])
        except Exception as error:  # torch.load raises half a dozen kinds on damaged files
            raise UserError(
                f"The checkpoint {path} is damaged ({first_line(error)}): delete it to start anew."
            ) from None

    def _optimizer_states(self) -> dict[str, dict[str, Any]]:
        """What the optimizer remembers of each head, as one optimizer for each head would say it."""
        states: dict[str, dict[str, Any]] = {head.key: {"state": {}} for head in self.heads}
        for values, heads, number in self._places():
            of_stack = self._optimizer.state[values]
            for place, head in enumerate(heads):
                states[head.key]["state"][number] = {
                    name: value.clone() if value.ndim == 0 else value[place].clone() for name, value in of_stack.items()
                }
        return states

    def _load_optimizer(self, states: dict[str, dict[str, Any]]) -> None:
        for values, heads, number in self._places():
            saved = [states[head.key]["state"][number] for head in heads]
            moments = {name: torch.stack([one[name] for one in saved]) for name in ("exp_avg", "exp_avg_sq")}
            # Where the step is counted is a matter of the optimizer's kind here, not of the one it was saved by.
            device = values.device if self._optimizer.param_groups[0]["fused"] else "cpu"
            self._optimizer.state[values] = {"step": saved[0]["step"].to(device), **moments}

    def _places(self) -> Iterator[tuple[Tensor, list[Head], int]]:
        """Parameters of a stack, the heads that share them, and the parameter's number within each head."""
        for stack, of_shape in zip(self._stacks, self._by_shape):
            for rate, joint in enumerate(stack.by_rate):
                for number, values in enumerate(joint.values()):
                    yield values, [heads[rate] for heads in of_shape], number


def _check_finite(value: Any) -> None:
    if isinstance(value, Tensor) and not is_finite(value):
        raise DamagedFile("it holds NaN or infinite values")
    for item in value.values() if isinstance(value, dict) else ():
        _check_finite(item)


def mean_losses(trainer: HeadTrainer, losses: Tensor) -> dict[str, float]:
    """Returns the losses by head, averaged over processes; waits for the device.

    Args:
        trainer: Whose heads they are.
        losses: One for each head, on the device.
    """
    values = losses.tolist()
    everywhere = gather_objects(values)
    return {head.key: sum(one[k] for one in everywhere) / len(everywhere) for k, head in enumerate(trainer.heads)}


def _stable_seed(seed: int, width: int, fuse: bool) -> int:
    digest = hashlib.blake2b(f"{seed}|{width}|{fuse}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")
