"""What the tests of ``fit3d-lift`` do with runs and PLY files."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from nerfstudio.utils.eval_utils import eval_setup

from fit3d_ns.commands.lift.cli import run_lift
from fit3d_ns.runs.checkpoints import find_checkpoint, read_checkpoint
from fit3d_ns.support.errors import UserError

STEPS = 12
"""Training steps of the runs that features are lifted onto, unless a test asks for others."""


def opened(config) -> Any:
    """A run as ns-eval opens it: its configuration and its pipeline."""
    loaded, pipeline, _, step = eval_setup(config, test_mode="test")
    assert step == int(find_checkpoint(config).stem.removeprefix("step-"))
    return loaded, pipeline


def state_of(config):
    """What a checkpoint holds, or that of a lift with its geometry; in memory, so that the file may be written to."""
    return deepcopy(read_checkpoint(find_checkpoint(config)))


def assert_same_lift(left, right):
    """Equal in everything that a checkpoint holds."""

    def compare(a, b, path):
        if isinstance(a, dict):
            assert a.keys() == b.keys(), path
            for name in a:
                compare(a[name], b[name], f"{path}/{name}")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), path
        else:
            assert a == b, path

    compare(state_of(left), state_of(right), "")


def lift_of(config, name="test_vit"):
    """The folder of a lift onto a run."""
    return config.parent / "lifts" / "fit3d-splat" / name


def write_ply(path, parameters, drop=()):
    """As ``ns-export gaussian-splat`` and 3DGS write it."""
    means = parameters["means"]
    columns = {name: means[:, i] for i, name in enumerate("xyz")}
    columns |= {f"f_dc_{i}": parameters["features_dc"][:, i] for i in range(3)}
    rest = parameters["features_rest"].transpose(1, 2).flatten(1)
    columns |= {f"f_rest_{i}": rest[:, i] for i in range(rest.shape[1])}
    columns |= {"opacity": parameters["opacities"][:, 0]}
    columns |= {f"scale_{i}": parameters["scales"][:, i] for i in range(3)}
    columns |= {f"rot_{i}": parameters["quats"][:, i] for i in range(4)}
    columns = {name: column for name, column in columns.items() if name not in drop}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(means)}"]
    header += [f"property float {name}" for name in columns] + ["end_header", ""]
    table = torch.stack(list(columns.values()), dim=1).numpy().astype("<f4")
    path.write_bytes("\n".join(header).encode() + table.tobytes())


def splat_of(run):
    state = state_of(run)["pipeline"]
    names = ("means", "scales", "quats", "opacities", "features_dc", "features_rest")
    return {name: state[f"_model.gauss_params.{name}"] for name in names}


def refused(pattern, *arguments):
    """A lift that ends in one sentence, which is returned."""
    with pytest.raises(UserError, match=pattern) as caught:
        run_lift(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
