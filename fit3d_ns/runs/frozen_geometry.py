"""Gaussians that come from elsewhere and stay as they are: other runs and files."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterDict

from fit3d_ns.runs.checkpoints import find_checkpoint, read_checkpoint
from fit3d_ns.runs.names import GAUSSIANS, POSE_ADJUSTMENT, SPLAT
from fit3d_ns.support.errors import UserError

_LOGGER = logging.getLogger(__name__)


def freeze_configuration(config: Any) -> None:
    """Settings under which splatfacto neither refines nor renders at reduced size or colour degree.

    Args:
        config: Splatfacto's configuration, changed in place.
    """
    config.stop_split_at = 0
    config.num_downscales = 0
    config.sh_degree_interval = 1
    if getattr(config, "strategy", "default") != "default":
        config.strategy = "default"  # MCMC moves Gaussians at every step, refinement or not


@torch.no_grad()
def replace_gaussians(gauss_params: ParameterDict, tensors: Mapping[str, Tensor | None], source: str) -> None:
    """Puts other Gaussians in place of a model's; for use before optimizers exist.

    Args:
        gauss_params: Of the model, changed in place; what is not splatfacto's own becomes zero.
        tensors: By the names of ``SPLAT``.
        source: Where they come from, for the sentence.

    Raises:
        UserError: If one is missing, of another shape, or not finite.
    """
    count = 0
    for name in SPLAT:
        stored, current = tensors.get(name), gauss_params[name]
        if stored is None or stored.shape[1:] != current.shape[1:] or len(stored) == 0:
            raise UserError(
                f"{source} holds no usable `{name}` (is it a splatfacto run, of the same --pipeline.model.sh-degree?): "
                "name another run."
            )
        broken = int((~torch.isfinite(stored.flatten(1))).any(1).sum())
        if broken:
            raise UserError(
                f"{broken} of {len(stored)} Gaussians in {source} have NaN or infinite `{name}`: train it again, or "
                "remove those Gaussians."
            )
        gauss_params[name] = Parameter(stored.detach().clone().to(current))
        count = len(stored)
    for name in [name for name in gauss_params if name not in SPLAT]:
        gauss_params[name] = Parameter(gauss_params[name].new_zeros(count, *gauss_params[name].shape[1:]))


def take_over_run(gauss_params: ParameterDict, camera_optimizer: Any, run: Path) -> None:
    """Puts the Gaussians of a trained run, and what it learned about its cameras, in place of a model's.

    Args:
        gauss_params: Of the model.
        camera_optimizer: Of the model.
        run: The run's folder, config.yml or checkpoint.

    Raises:
        UserError: If the run cannot be read, or does not fit.
    """
    checkpoint = find_checkpoint(run)
    state = read_checkpoint(checkpoint)["pipeline"]
    replace_gaussians(gauss_params, {name: state.get(f"{GAUSSIANS}{name}") for name in SPLAT}, str(checkpoint))
    learned, own = (
        state.get(POSE_ADJUSTMENT),
        getattr(camera_optimizer, "pose_adjustment", None),
    )
    if learned is None or not bool(learned.any()):
        return
    if own is not None and own.shape == learned.shape:
        own.data.copy_(learned)
    else:
        _LOGGER.warning(
            "%s was trained with camera optimization; features are lifted at the original poses.", checkpoint
        )
