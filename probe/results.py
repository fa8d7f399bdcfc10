"""The output folder of a probe: what it was asked, what each seed gave, and whether that is finished."""

import hashlib
import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image

from fit3d_ns.errors import UserError
from fit3d_ns.files import atomic_path, atomic_write_json
from probe.distributed import world_size

_PACKAGES = ("fit3d-ns", "torch", "torchmetrics", "timm", "numpy")


class ResultFolder:
    """Results below an output folder."""

    def __init__(self, folder: Path, question: dict[str, Any]) -> None:
        """Opens a folder, new or of the same question.

        Args:
            folder: The output folder.
            question: All that decides the results, beside the seed; JSON-able.

        Raises:
            UserError: If the folder holds the results of another question, or cannot be used.
        """
        self.folder = folder
        self._question = json.loads(json.dumps(question, sort_keys=True, default=str))
        content = json.dumps(self._question, sort_keys=True)
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder with --output-dir.")
        path = folder / "question.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError):
                found = {}
            difference = _first_difference(found, self._question)
            if difference is not None:
                raise UserError(
                    f"{folder} holds the results of another probe (it differs in {difference}): choose another "
                    "--output-dir, or delete it."
                )

    def start(self) -> None:
        """Writes down the question."""
        atomic_write_json(self.folder / "question.json", self._question)

    def checkpoint(self, seed: int) -> Path:
        """Returns where a seed's training is saved."""
        return self.folder / "checkpoints" / f"seed_{seed}.pt"

    def read_seed(self, seed: int) -> Optional[dict[str, Any]]:
        """Returns a finished seed's results."""
        try:
            content = json.loads((self.folder / "seeds" / f"seed_{seed}.json").read_text())
        except (OSError, ValueError):
            return None
        return content if content.get("fingerprint") == self.fingerprint else None

    def write_seed(self, seed: int, rows: dict[str, Any], timing: dict[str, float]) -> None:
        """Writes a finished seed's results."""
        content = {"fingerprint": self.fingerprint, "seed": seed, "rows": rows, "timing": timing}
        atomic_write_json(self.folder / "seeds" / f"seed_{seed}.json", content)

    def write_panel(self, place: int, name: str, picture: np.ndarray) -> None:
        """Keeps a picture for the report."""
        with atomic_path(self.folder / "panels" / f"{place:06d}_{name}.png") as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")

    def read_panels(self) -> dict[int, dict[str, np.ndarray]]:
        """Returns the pictures that were kept, by place and name."""
        panels: dict[int, dict[str, np.ndarray]] = {}
        for path in sorted((self.folder / "panels").glob("[0-9]*_*.png")):
            place, _, name = path.stem.partition("_")
            with Image.open(path) as picture:
                panels.setdefault(int(place), {})[name] = np.asarray(picture.convert("RGB"))
        return panels


def summarize(values: Sequence[Optional[float]]) -> dict[str, Any]:
    """Returns mean and spread (sample standard deviation; None for a single value) of one metric over seeds."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns the exact command, the versions and the machine's kind."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}},
        "device": gpu or "CPU",
    }


def _program() -> list[str]:
    name = Path(sys.argv[0]).name
    if world_size() > 1:
        return [
            "torchrun",
            "--nproc-per-node",
            str(world_size()),
            *(["-m", "probe.cli"] if name == "cli.py" else [name]),
        ]
    return ["python", "-m", "probe.cli"] if name == "cli.py" else [name]


def _version(package: str) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_difference(found: Any, wanted: Any, path: str = "") -> Optional[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            difference = _first_difference(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
            if difference is not None:
                return difference
        return None
    return None if found == wanted else path or "everything"
