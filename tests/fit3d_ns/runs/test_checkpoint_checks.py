"""What a checkpoint must hold: every tensor of a real one, each damaged alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from paths import DATA
from torch import Tensor

from fit3d_ns.runs.checkpoint_checks import check_state
from fit3d_ns.runs.checkpoints import read_checkpoint
from fit3d_ns.runs.training_state import check_optimizers
from fit3d_ns.support.errors import DamagedFile, UserError

CHECKPOINT = next((DATA / "run_0.1.0").rglob("*.ckpt"))


def _read() -> dict[str, Any]:
    return torch.load(CHECKPOINT, map_location="cpu", weights_only=True)


def _tensors(value: Any, path: tuple = ()) -> Iterator[tuple]:
    for key, item in value.items():
        if isinstance(item, Tensor):
            yield (*path, key)
        elif isinstance(item, dict):
            yield from _tensors(item, (*path, key))


PATHS = [path for path in _tensors(_read())]
KINDS = {
    "another dtype": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.float(),
    "half": lambda tensor: tensor.reshape(-1)[: max(1, tensor.numel() // 2)].clone(),
    "more rows": lambda tensor: torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor[None].repeat(2),
}

OTHERS = {
    "missing": None,
    "none": None,
    "word": "word",
    "seven": 7,
    "list": [],
    "dictionary": {},
    "three": torch.zeros(3),
}
MAY_BE_ABSENT = {"teacher_identity", "teacher_precision", "photos", "backbone_layer", "grad2d", "count", "radii"}
MAY_BE_SEVEN = {"scene_scale", "backbone_layer"}
USED_BY_NOBODY = {"_is_initial", "_get_lr_called_within_step", "lr_lambdas", "device_indicator_param"}
# A run without features is told by those who need them.
OPTIONAL_TOGETHER = {"pipeline._model.gauss_params.fit3d_features", "pipeline._model.fit3d_decoder.weight"}
# Without spherical harmonics it has no gradient, and no state.
NEVER_STEPPED = {"optimizers.features_rest.state", "optimizers.features_rest.state.0"}


def _entries(value: dict, path: tuple = ()) -> Iterator[tuple]:
    for key, item in value.items():
        yield (*path, key)
        if isinstance(item, dict):
            yield from _entries(item, (*path, key))


def _lift() -> dict[str, Any]:
    """The checkpoint of a lift, which has Gaussians, features and decoder elsewhere."""
    state = _read()
    pipeline = {"_extra_state": state["pipeline"]["_extra_state"]}
    geometry = {"path": "../step-000000029.ckpt", "bytes": 131869, "num_gaussians": 122}
    return {**state, "pipeline": pipeline, "optimizers": {}, "schedulers": {}, "scalers": {}, "geometry": geometry}


def _check(state: dict[str, Any]) -> None:
    """As a training that goes on does."""
    check_state(state, CHECKPOINT)
    check_optimizers(state)


STATES = {"run": _read, "lift": _lift}


def test_it_is_whole():
    assert len(PATHS) > 35 and ("pipeline", "_extra_state", "random", "torch") in PATHS
    for read in STATES.values():
        _check(read())


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("which", STATES)
def test_an_entry_of_another_kind_is_refused(which, other):
    accepted = []
    for path in _entries(STATES[which]()):
        state = STATES[which]()
        holder: Any = state
        for key in path[:-1]:
            holder = holder[key]
        before = holder.pop(path[-1])
        if other != "missing":
            holder[path[-1]] = OTHERS[other]
        name, last = ".".join(map(str, path)), str(path[-1]).rpartition(".")[2]
        absent = other in ("missing", "none") and (last in MAY_BE_ABSENT or name.endswith("sampler.random"))
        same_kind = other != "missing" and type(before) is type(OTHERS[other])
        # What another valid value meant, nobody can know.
        valid = same_kind and not isinstance(before, (dict, Tensor)) or (other == "seven" and last in MAY_BE_SEVEN)
        absent = absent or (other == "missing" and name in OPTIONAL_TOGETHER)
        if absent or valid or last in USED_BY_NOBODY or name in NEVER_STEPPED or (same_kind and before == {}):
            continue
        try:
            _check(state)
            accepted.append(name)
        except DamagedFile:
            pass
    # All optimizers may be gone together, and start anew.
    fine = {"missing": {"run": [], "lift": []}, "dictionary": {"run": ["optimizers"], "lift": []}}
    assert accepted == fine.get(other, {}).get(which, []), accepted


def test_only_a_training_that_goes_on_needs_the_optimizers(tmp_path, scene, make_config, make_trainer):
    state = _read()
    state["optimizers"]["means"]["state"][0]["exp_avg"] = torch.zeros(3)
    check_state(state, CHECKPOINT)
    config = make_config(scene, steps=2)
    make_trainer(config).train()
    checkpoint = config.get_checkpoint_dir() / "step-000000001.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    state["optimizers"]["means"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, checkpoint)
    read_checkpoint(checkpoint)
    config = make_config(scene, steps=4)
    config.load_checkpoint = checkpoint
    with pytest.raises(UserError, match=r"step-000000001.ckpt cannot be gone on with \(optimizers.means.*exp_avg is 3"):
        make_trainer(config).train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_one_tensor_that_is_not_what_it_was_is_named(path, kind):
    state = _read()
    holder = state
    for key in path[:-1]:
        holder = holder[key]
    damaged = KINDS[kind](holder[path[-1]])
    if damaged.dtype == holder[path[-1]].dtype and damaged.shape == holder[path[-1]].shape:
        return  # nothing to halve
    holder[path[-1]] = damaged
    with pytest.raises(DamagedFile) as error:
        _check(state)
    named = path[-1].rpartition(".")[2] if path[0] == "pipeline" else path[1]
    assert named in str(error.value) or "Gaussians are 122 and" in str(error.value)
