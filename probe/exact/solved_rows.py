"""What the exact protocol keeps of each row: its map, and the sums of every test photo."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.support.errors import DamagedFile
from fit3d_ns.support.files import discard
from fit3d_ns.support.tensor_files import TensorSpec, read_tensors, write_tensors
from probe.output_folder import ResultFolder
from probe.solvers.ridge import Choice, LinearMap

_LOGGER = logging.getLogger(__name__)
_MAP = {"weight": TensorSpec(torch.float32, ("K", "C")), "bias": TensorSpec(torch.float32, ("K",))}
_SUMS = {"sums": TensorSpec(torch.float64, ("photos", "S"))}


class SolvedRows:
    """Files of solved rows below an output folder, by key; those of another question are not seen."""

    def __init__(self, results: ResultFolder) -> None:
        """Takes the output folder.

        Args:
            results: The output folder.
        """
        self._results = results
        self._folder = results.folder / "rows"

    def has_map(self, key: str) -> bool:
        """Returns whether a row is solved.

        Args:
            key: Of the row.
        """
        return self.read_facts(key) is not None

    def write_map(self, key: str, choice: Choice, seconds: float) -> None:
        """Writes a row's map, how it was chosen, and the time that took.

        Args:
            key: Of the row.
            choice: The map, its decay, and the scores of all decays.
            seconds: That the choice took.
        """
        facts = {
            "decay": choice.decay,
            "held_out": {f"{decay:g}": score for decay, score in choice.scores.items()},
            "seconds": seconds,
        }
        tensors = {"weight": choice.linear.weight.float(), "bias": choice.linear.bias.float()}
        self._write(f"{key}.safetensors", tensors, facts)

    def read_facts(self, key: str) -> dict[str, Any] | None:
        """Returns how a row's map was chosen; None if there is none.

        Args:
            key: Of the row.
        """
        found = self._read(f"{key}.safetensors", _MAP)
        return None if found is None else found[1]

    def read_map(self, key: str, device: torch.device) -> LinearMap:
        """Returns a row's map.

        Args:
            key: Of a row that is solved.
            device: Where the map goes.
        """
        found = self._read(f"{key}.safetensors", _MAP)
        assert found is not None
        return LinearMap(found[0]["weight"].to(device), found[0]["bias"].to(device))

    def write_sums(self, key: str, sums: Tensor) -> None:
        """Writes the sums [photos, S] of a row on the test photos.

        Args:
            key: Of the row.
            sums: [photos, S], float64.
        """
        self._write(f"{key}.sums.safetensors", {"sums": sums}, {})

    def read_sums(self, key: str) -> Tensor | None:
        """Returns those sums; None if there are none.

        Args:
            key: Of the row.
        """
        found = self._read(f"{key}.sums.safetensors", _SUMS)
        return None if found is None else found[0]["sums"]

    def _write(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        metadata = {"fingerprint": self._results.fingerprint, "facts": json.dumps(facts)}
        discard(self._folder / name)
        write_tensors(self._folder / name, tensors, metadata)

    def _read(self, name: str, specs: Mapping[str, TensorSpec]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self._folder / name
        try:
            found = read_tensors(path, specs)
            if found.metadata.get("fingerprint") != self._results.fingerprint:
                return None
            return found.tensors, json.loads(found.metadata["facts"])
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            _LOGGER.warning(f"{path} is damaged and made anew: {error}.")
            return None
