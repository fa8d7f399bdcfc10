"""timm models as architectures: names checked, built without weights, described."""

import difflib
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from fit3d_ns.backbones.registry import NAMED_BACKBONES, NamedBackbone, find_named
from fit3d_ns.backbones.spec import BackboneInfo, BackboneSpec
from fit3d_ns.support.errors import UserError

OLDEST_TIMM = "1.0.22"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_timm() -> None:
    """Checks, without importing it, that timm is installed and new enough.

    Raises:
        UserError: If it is missing or too old (nerfstudio 1.1.5 pins timm 0.6.7, which has no DINOv2).
    """
    advice = f'install a newer one with: pip install "timm>={OLDEST_TIMM}" (nerfstudio itself never imports timm)'
    try:
        installed = metadata.version("timm")
    except metadata.PackageNotFoundError:
        raise UserError(f"timm is not installed: {advice}.") from None
    if Version(installed) < Version(OLDEST_TIMM):
        raise UserError(f"timm {installed} is too old for the backbones, which need {OLDEST_TIMM} or newer: {advice}.")


def resolve_architecture(name: str) -> NamedBackbone:
    """Finds the architecture that a user's name means: a registered name, or any timm id (with or without tag).

    Args:
        name: What the user typed.

    Returns:
        The registered entry, or an unregistered one whose name is its timm id.

    Raises:
        UserError: If neither the registry nor timm knows the name (close matches are named), or timm is too old.
    """
    check_timm()
    named = find_named(name)
    if named is not None:
        return named
    import timm
    from timm.models import is_model, is_model_pretrained, list_models

    timm_id = name.removeprefix("timm/")
    architecture, _, tag = timm_id.partition(".")
    if not is_model(architecture) or (tag and not is_model_pretrained(timm_id)):
        known = [*NAMED_BACKBONES, *list_models(), *list_models(pretrained=True)]
        close = difflib.get_close_matches(timm_id, known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"the named ones are {', '.join(NAMED_BACKBONES)}."
        raise UserError(f"{{backbone}} {name}: neither fit3d-ns nor timm {timm.__version__} knows it; {hint}")
    default = timm.get_pretrained_cfg(timm_id, allow_unregistered=True)
    if not tag and default is not None and default.tag:
        timm_id = f"{architecture}.{default.tag}"
    return find_named(timm_id) or NamedBackbone(timm_id, timm_id, "timm model")


def build_model(architecture: NamedBackbone, device: str | torch.device) -> nn.Module:
    """Builds the timm model with random weights, for images of any size, leaving the random generators untouched.

    Args:
        architecture: See `resolve_architecture`.
        device: Where its tensors are made; ``meta`` makes none.

    Returns:
        The timm model, without classifier.

    Raises:
        UserError: If it is no vision transformer with patch tokens that takes images of any size, or timm lacks it.
    """
    import timm

    if not _is_known(architecture):
        raise UserError(
            f"{{backbone}} {architecture.name}: timm {timm.__version__} does not have it yet (as "
            f"{architecture.timm_id}): run `pip install --upgrade timm`, or choose another."
        )
    device = torch.device(device)
    options: dict[str, Any] = {} if architecture.depth is None else {"depth": architecture.depth}
    devices = [device.index or 0] if device.type == "cuda" else []
    # Otherwise a run that finds its features cached would train with other random numbers than one that does not.
    with torch.random.fork_rng(devices=devices):
        try:
            with device:
                model = timm.create_model(
                    architecture.timm_id, pretrained=False, num_classes=0, dynamic_img_size=True, **options
                )
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            raise _unsuitable(architecture) from None
    needed = ("forward_intermediates", "blocks", "patch_embed", "num_prefix_tokens")
    if not all(hasattr(model, attribute) for attribute in needed):
        raise _unsuitable(architecture)
    return model


@lru_cache(maxsize=16)
def skeleton(architecture: NamedBackbone) -> nn.Module:
    """Returns the timm model on the meta device: shapes and names of everything, memory for nothing.

    Args:
        architecture: Named, or made of any timm id by `resolve_architecture`.
    """
    return build_model(architecture, "meta")


def check_memory(architecture: NamedBackbone, device: str | torch.device) -> None:
    """Refuses a backbone whose weights do not fit, before they are read or downloaded.

    Args:
        architecture: See `resolve_architecture`.
        device: Where it is to go.

    Raises:
        UserError: If they do not; says which named backbone would.
    """
    device = torch.device(device)
    free = _free_memory(device)
    # On the CPU, the file's tensors lie beside the model's for a moment.
    copies = 1 if device.type == "cuda" else 2
    needed = copies * weights_bytes(architecture)
    if free is None or needed <= free:
        return
    family = architecture.name.split("_", maxsplit=1)[0]
    smaller = [one for one in NAMED_BACKBONES.values() if not one.offline and one.name != architecture.name]
    fitting = [(one.name.startswith(f"{family}_"), weights_bytes(one), one.name) for one in smaller if _is_known(one)]
    fitting = [one for one in fitting if 2 * copies * one[1] <= free]  # half is left for the work
    advice = "take a machine with more"
    if fitting:
        _, size, name = max(fitting)  # of its family before others, large before small
        advice = f"{name} ({size / 2**30:.1f} GiB) does"
    raise UserError(
        f"{{backbone}} {architecture.name}: its weights, {needed / copies / 2**30:.1f} GiB in fp32, do not fit into "
        f"the {free / 2**30:.1f} GiB that are free on {device.type}: {advice}."
    )


def weights_bytes(architecture: NamedBackbone) -> int:
    """Returns the bytes of a backbone's weights in fp32.

    Args:
        architecture: Named, or made of any timm id by `resolve_architecture`.
    """
    return 4 * sum(parameter.numel() for parameter in skeleton(architecture).parameters())


def _is_known(architecture: NamedBackbone) -> bool:
    from timm.models import is_model

    return is_model(architecture.timm_id.partition(".")[0])


def _free_memory(device: torch.device) -> int | None:
    """Bytes that are free; None where that is not to be found out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def describe_backbone(spec: BackboneSpec) -> BackboneInfo:
    """Describes a backbone without reading or downloading weights.

    Args:
        spec: The user's choice; ``weights`` is ignored.

    Returns:
        Width, patch size, layers, the layer taken, mean and std, prefix tokens.

    Raises:
        UserError: Unknown name, unsuitable model, layer out of range, or timm too old.
    """
    architecture = resolve_architecture(spec.name)
    model: Any = skeleton(architecture)
    patch_height, patch_width = model.patch_embed.feat_ratio(as_scalar=False)
    if patch_height != patch_width:
        raise _unsuitable(architecture)
    num_layers = len(model.blocks)
    own = model.pretrained_cfg
    imagenet = spec.normalization == "imagenet"
    return BackboneInfo(
        name=architecture.name,
        timm_id=architecture.timm_id,
        width=int(model.num_features),
        patch_size=int(patch_height),
        num_layers=num_layers,
        layer=_resolve_layer(spec.layer, num_layers, architecture.name),
        mean=IMAGENET_MEAN if imagenet else tuple(own["mean"]),
        std=IMAGENET_STD if imagenet else tuple(own["std"]),
        num_prefix_tokens=int(model.num_prefix_tokens),
    )


def _resolve_layer(layer: int | None, num_layers: int, name: str) -> int:
    if layer is None:
        return num_layers - 1
    if not -num_layers <= layer < num_layers:
        raise UserError(
            f"{{backbone_layer}} {layer}: {name} has {num_layers} layers, so give a number from 0 to {num_layers - 1}, "
            f"or from -{num_layers} to -1 counted from the end."
        )
    return layer % num_layers


def _unsuitable(architecture: NamedBackbone) -> UserError:
    return UserError(
        f"{{backbone}} {architecture.name}: it is no plain vision transformer with patch tokens that takes images "
        f"of any size; choose one, such as {', '.join(list(NAMED_BACKBONES)[:3])}."
    )
