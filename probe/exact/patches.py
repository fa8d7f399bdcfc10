"""Training patches for the exact protocol: from memory where they fit, else read from disk at every pass."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.backbones import Assembly, BackboneOutput, assemble
from fit3d_ns.support.console import rank
from fit3d_ns.support.processes import world_size
from probe.data.base import IGNORE
from probe.features.rows import Row
from probe.features.store import FeatureStore
from probe.solvers.logistic import Batches
from probe.solvers.ridge import GramSums

ORIGINAL = "original"
_MEMORY_SHARE = 0.6
"""Of the free memory that patches of two backbones may take."""
_BATCH = 131_072
"""Patches handed on at once."""


@dataclass(frozen=True)
class Unit:
    """A row of the table for one of its students."""

    row: Row
    """Of the table."""
    partner: str | None
    """The student's name; None where only the original is taken."""

    @property
    def key(self) -> str:
        """Unique, and fit for a file name."""
        return self.row.name if self.partner in (None, self.row.partner) else f"{self.row.name}@{self.partner}"


def row_tokens(assembly: Assembly, original: Tensor | None, tuned: Tensor | None) -> Tensor:
    """Assembles tokens [P, C] or [B, C, h, w] of two backbones, in float32.

    Args:
        assembly: How the two are put together.
        original: Tokens of the original, [P, C] or [B, C, h, w]; None where they are not taken.
        tuned: Tokens of the fine-tuned backbone, likewise.

    Returns:
        float32, of the assembly's width.
    """
    outputs = [None if tokens is None else BackboneOutput(tokens.float(), None) for tokens in (original, tuned)]
    return assemble(assembly, *outputs).patch_tokens


def row_matrix(assembly: Assembly, width: int, paired: bool) -> Float[Tensor, "C2 C1"]:
    """Returns the matrix that makes a row's tokens of one backbone's, or of the original's and a student's together.

    Args:
        assembly: Of the row.
        width: Channels C of one backbone.
        paired: Whether there are two backbones.
    """
    one = torch.eye(width, dtype=torch.float64)
    none = torch.zeros_like(one)
    left, right = ([one, none], [none, one]) if paired else ([one], [one])
    blocks = {
        "original": [left],
        "duplicate": [left, left],
        "tuned": [right],
        "add": [[one, one]],
        "concat": [left, right],
    }[assembly]
    return torch.cat([torch.cat(row, 1) for row in blocks])


class TrainingPatches:
    """This process's share of the patches of training photos, with their truth; of kept and of held-out photos."""

    def __init__(
        self,
        stores: dict[str, FeatureStore],
        held_out: Sequence[int],
        num_classes: int | None,
        width: int,
        device: torch.device,
    ) -> None:
        """Reads the truth of every patch.

        Args:
            stores: Features of the training photos, with the truth of their patches, by backbone.
            held_out: Places of the photos that a decay is chosen on.
            num_classes: Of class ids; None if the truth is numbers.
            width: Channels C of a backbone's token.
            device: Where patches go.
        """
        self._width = width
        self._stores, self._held_out, self._device = stores, frozenset(held_out), device
        self._labelled = num_classes is not None
        first = next(iter(stores.values()))
        self._shards = first.shards()[rank() :: world_size()]
        self._tokens: dict[tuple[str, bool], Tensor] = {}
        self._truth: dict[bool, Tensor] = {}
        self.photos_without_truth = 0
        found: dict[bool, list[Tensor]] = {False: [], True: []}
        for shard in self._shards:
            places, tensors = first.load_shard(shard)
            known = self._known(tensors["target"])
            self.photos_without_truth += int((~known.flatten(1).any(1)).sum())
            for held, parts in found.items():
                mine = self._mine(places, held)
                parts.append(tensors["target"][mine][known[mine]])
        for held, parts in found.items():
            truth = torch.cat(parts) if parts else self._known_of_nothing(first)
            self._truth[held] = truth.to(device)
        count = sum(len(truth) for truth in self._truth.values())
        # A CPU would turn half precision into single at every pass.
        dtypes = (torch.float32, torch.float16) if device.type == "cpu" else (torch.float16,)
        free = _free_memory(device)
        self._dtype = next((dtype for dtype in dtypes if 2 * count * width * dtype.itemsize < free), None)

    def sums(self, names: Sequence[str], held: bool, num_targets: int) -> GramSums:
        """Sums tokens of some backbones beside each other, with their truth, over all processes.

        Args:
            names: Of the backbones.
            held: Whether over the held-out photos, instead of the others.
            num_targets: Numbers T of a patch's truth.

        Returns:
            Sums of products over all processes.
        """
        sums = GramSums.zeros(self._width * len(names), num_targets, self._device)
        for tokens, truth in self._pass(names, held):
            sums.add(torch.cat([tokens[name].float() for name in names], 1), truth)
        sums.all_reduce()
        return sums

    def batches(self, unit: Unit, held: bool) -> Batches:
        """Returns the passes over a row's tokens and their truth.

        Args:
            unit: The row and its student.
            held: Whether over the held-out photos, instead of the others.
        """
        names = [ORIGINAL] if unit.row.assembly != "tuned" else []
        names += [unit.partner] if unit.partner else []

        def start() -> Iterable[tuple[Tensor, Tensor]]:
            for tokens, truth in self._pass(names, held):
                original = tokens.get(ORIGINAL)
                yield row_tokens(unit.row.assembly, original, tokens[unit.partner] if unit.partner else None), truth

        return start

    def release(self, name: str) -> None:
        """Forgets a backbone's tokens, if they are in memory.

        Args:
            name: Of the backbone.
        """
        for held in (False, True):
            self._tokens.pop((name, held), None)

    def _pass(self, names: Sequence[str], held: bool) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        truth = self._truth[held]
        finish = Tensor.long if self._labelled else Tensor.float
        if self._dtype is not None:
            loaded = {name: self._in_memory(name, held) for name in names}
            for start in range(0, len(truth), _BATCH):
                batch = slice(start, start + _BATCH)
                yield {name: tokens[batch] for name, tokens in loaded.items()}, finish(truth[batch])
            return
        start = 0
        for parts in zip(*(self._from_disk(name, held) for name in names)):
            batch = slice(start, start + len(parts[0]))
            start = batch.stop
            yield {name: tokens.to(self._device) for name, tokens in zip(names, parts)}, finish(truth[batch])

    def _in_memory(self, name: str, held: bool) -> Tensor:
        if (name, held) not in self._tokens:
            assert self._dtype is not None
            truth = self._truth[held]
            tokens = torch.empty(len(truth), self._width, dtype=self._dtype, device=self._device)
            start = 0
            for part in self._from_disk(name, held):
                tokens[start : start + len(part)] = part.to(self._device)
                start += len(part)
            self._tokens[name, held] = tokens
        return self._tokens[name, held]

    def _from_disk(self, name: str, held: bool) -> Iterator[Tensor]:
        store = self._stores[name]
        for shard in self._shards:
            places, tensors = store.load_shard(shard)
            mine = self._mine(places, held)
            known = self._known(tensors["target"][mine])
            yield tensors[name][mine].permute(0, 2, 3, 1)[known]  # [p, C]

    def _mine(self, places: range, held: bool) -> list[int]:
        return [number for number, place in enumerate(places) if (place in self._held_out) == held]

    def _known(self, target: Tensor) -> Tensor:
        return target != IGNORE if self._labelled else torch.isfinite(target).all(-1)

    def _known_of_nothing(self, store: FeatureStore) -> Tensor:
        _, tensors = store.load_shard(0)
        return tensors["target"][:0][self._known(tensors["target"][:0])]


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    return _MEMORY_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / max(1, world_size())
