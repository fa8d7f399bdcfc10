"""Training patches for the exact protocol: from memory where they fit, else read from disk at every pass."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.backbones import Assembly, BackboneOutput, assemble
from fit3d_ns.support.console import rank
from fit3d_ns.support.processes import world_size
from fit3d_ns.support.progress import progress
from probe.data.base import IGNORE
from probe.data.batches import ordered_samples
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
        read_truth: Callable[[int], dict[str, Any]],
        workers: int,
        held_out: Sequence[int],
        num_outputs: int,
        labelled: bool,
        width: int,
        device: torch.device,
    ) -> None:
        """Reads the truth of every patch.

        Args:
            stores: Features of the training photos, by backbone.
            read_truth: Returns the ``target`` of a photo's patches, by its place in the list: class ids uint8 [h, w] or
                numbers float32 [h, w, T] (`Task.patch_truth`).
            workers: Processes that read ahead.
            held_out: Places of the photos that a decay is chosen on.
            num_outputs: Classes, or numbers T.
            labelled: Whether the truth is class ids.
            width: Channels C of a backbone's token.
            device: Where patches go.

        Raises:
            UserError: If a truth cannot be read.
        """
        self._width = width
        self._stores, self._held_out, self._device = stores, frozenset(held_out), device
        self._labelled = labelled
        first = next(iter(stores.values()))
        self._shards = {shard: first.places(shard) for shard in first.shards()[rank() :: world_size()]}
        self._tokens: dict[tuple[str, bool], Tensor] = {}
        self._known: dict[int, Tensor] = {}
        """Which patches [h, w] of a photo have a truth, by its place."""
        found: dict[bool, list[Tensor]] = {False: [], True: []}
        indices = [place for places in self._shards.values() for place in places]
        with progress("truth of patches", len(indices)) as advance:
            for place, sample in ordered_samples(read_truth, indices, workers):
                target = sample["target"]
                known = target != IGNORE if labelled else torch.isfinite(target).all(-1)
                self._known[place] = known
                found[place in self._held_out].append(target[known])
                advance(1)
        self.photos_without_truth = sum(not known.any() for known in self._known.values())
        nothing = torch.zeros(0, dtype=torch.uint8) if labelled else torch.zeros(0, num_outputs)
        self._truth = {held: torch.cat([nothing, *parts]).to(device) for held, parts in found.items()}
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
        for shard, places in self._shards.items():
            tokens = self._stores[name].load_shard(shard)[name]
            mine = [number for number, place in enumerate(places) if (place in self._held_out) == held]
            if mine:
                known = torch.stack([self._known[places[number]] for number in mine])  # [photos, h, w]
                yield tokens[mine].permute(0, 2, 3, 1)[known]  # [p, C]


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    return _MEMORY_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / max(1, world_size())
