"""The student: a backbone made ready for training, and what is saved of it."""

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from distill.config import DistillConfig
from distill.scenes import Scene
from fit3d_ns.backbones import Backbone, BackboneSpec, load_backbone, spec_of_identity
from fit3d_ns.support.errors import UserError, flags_are


def teacher_spec(scenes: Sequence[Scene]) -> BackboneSpec:
    """Returns the backbone that the scenes' features come from, by the first of them.

    Args:
        scenes: Scenes of one teacher.
    """
    info = scenes[0].info
    return spec_of_identity(info.teacher, Path(info.teacher_weights) if info.teacher_weights else None)


def load_teacher(scenes: Sequence[Scene], device: torch.device, weights: Path | None = None) -> Backbone:
    """Loads the scenes' teacher and checks that it is that very one.

    Args:
        scenes: Scenes of one teacher.
        device: Where it goes.
        weights: Its weight file, if the scenes' own path no longer holds.

    Returns:
        The frozen teacher.

    Raises:
        UserError: If its weights cannot be had, or are not those the features were lifted with.
    """
    spec = teacher_spec(scenes)
    if weights is not None:
        spec = replace(spec, weights=weights)
    teacher = _load(spec, device)
    expected, found = scenes[0].info.teacher["weights_sha256"], teacher.identity["weights_sha256"]
    if expected != found:
        raise UserError(
            f"The weights of {spec.name}{f' in {spec.weights}' if spec.weights else ''} are not those that the scenes "
            "were lifted with (their hashes differ): name those with --student-weights, or lift the scenes again."
        )
    return teacher


def load_student(config: DistillConfig, scenes: Sequence[Scene], device: torch.device) -> Backbone:
    """Loads the backbone to fine-tune: the scenes' teacher unless the user names another.

    Where the teacher is itself a student, its original is taken, unless the user wants to start from the teacher.

    Args:
        config: The user's choices.
        scenes: Scenes of one teacher.
        device: Where it goes.

    Returns:
        With the weights that training starts from.

    Raises:
        UserError: As `load_teacher`; or if another backbone's width differs from the teacher's.
    """
    another = config.student is not None or config.student_layer is not None
    original = scenes[0].info.teacher_original
    if not another and (original is None or config.start_from == "teacher"):
        return load_teacher(scenes, device, config.student_weights)
    teacher = teacher_spec(scenes)
    if config.student is not None:
        norm, normalization = teacher.norm, teacher.normalization
        spec = BackboneSpec(config.student, config.student_weights, config.student_layer, norm, normalization)
    elif original is not None and config.start_from == "original":
        return _load_original(original, config.original_weights, device, config.student_layer)
    else:
        spec = replace(teacher, weights=config.student_weights or teacher.weights, layer=config.student_layer)
    student = _load(spec, device)
    width = scenes[0].info.teacher["width"]
    if student.info.width != width:
        raise UserError(
            f"--student {student.info.name} has {student.info.width} channels, but the scenes' features have {width}: "
            f"choose a backbone of that width, or leave --student out to fine-tune {teacher.name}."
        )
    return student


def load_original(config: DistillConfig, scenes: Sequence[Scene], student: Backbone, device: torch.device) -> Backbone:
    """Loads what the student is averaged with, compared with and put beside: itself before any fine-tuning.

    Args:
        config: The user's choices.
        scenes: Scenes of one teacher.
        student: Of `load_student`, before training.
        device: Where it goes.

    Returns:
        ``student`` itself, unless it is a teacher that was fine-tuned already.

    Raises:
        UserError: If the original's weights cannot be had, or are others than the card of the teacher names.
    """
    original = scenes[0].info.teacher_original
    if original is None or student.identity["weights_sha256"] != scenes[0].info.teacher["weights_sha256"]:
        return student
    return _load_original(original, config.original_weights, device, student.info.layer)


def _load_original(
    identity: Mapping[str, Any], weights: Path | None, device: torch.device, layer: int | None
) -> Backbone:
    """Loads what a teacher was fine-tuned from, at another layer if one is given."""
    spec = spec_of_identity(identity, weights)
    with flags_are(
        backbone="the original in the teacher's card",
        backbone_weights="--original-weights",
        backbone_layer="--student-layer",
    ):
        original = load_backbone(spec if layer is None else replace(spec, layer=layer), device)
    if original.identity["weights_sha256"] != identity["weights_sha256"]:
        what = f"{weights} does not hold" if weights else f"What {spec.name} stands for is not"
        raise UserError(
            f"{what} the weights that the scenes' teacher was fine-tuned from (their hashes differ): name the file "
            "that does with --original-weights."
        )
    return original


def _load(spec: BackboneSpec, device: torch.device) -> Backbone:
    with flags_are(backbone="--student", backbone_weights="--student-weights", backbone_layer="--student-layer"):
        return load_backbone(spec, device)


def prepare_training(student: Backbone, config: DistillConfig) -> list[nn.Parameter]:
    """Leaves only those weights trainable that the features depend on, or adds low-rank updates.

    Blocks after the layer taken never run; their weights stay as they are and in the result.

    Args:
        student: The backbone, changed in place.
        config: The user's choices.

    Returns:
        The trainable parameters.

    Raises:
        UserError: If low-rank updates are asked for and the attention has no single layer for them.
    """
    _freeze_unused(student)
    if config.lora_rank > 0:
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        generator = torch.Generator().manual_seed(config.seed)
        model: Any = student.model
        for block in model.blocks[: student.info.layer + 1]:
            for name in ("qkv", "proj"):
                layer = getattr(block.attn, name, None)
                if layer is None:
                    raise UserError(
                        f"--lora-rank {config.lora_rank}: the attention of {student.info.name} has no single layer "
                        f"{name}: leave it out to train all weights."
                    )
                rows, columns = layer.weight.shape
                update = LowRankUpdate(rows, columns, config.lora_rank, generator).to(layer.weight.device)
                parametrize.register_parametrization(layer, "weight", update)
    if config.gradient_checkpointing:
        _recompute_blocks(student.model)
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


class LowRankUpdate(nn.Module):
    """LoRA (arXiv 2106.09685): a weight plus a product of two thin matrices, zero at first, at scale 1.

    Args:
        rows: Rows of the weight.
        columns: Columns of the weight.
        rank: Inner size of the product.
        generator: Source of the initial values.
    """

    def __init__(self, rows: int, columns: int, rank: int, generator: torch.Generator):
        super().__init__()
        bound = math.sqrt(3.0 / columns)  # the usual initialisation of a linear layer's input side
        self.down = nn.Parameter(torch.empty(rank, columns).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Returns the updated weight.

        Args:
            weight: Of the layer, as loaded.
        """
        return weight + self.up @ self.down


def make_average(student: Backbone, decay: float) -> AveragedModel | None:
    """Returns the exponential moving average of the student, to be updated after every step; None for decay 0.

    Args:
        student: The backbone in training.
        decay: Share of the average that stays at each step, in [0, 1).
    """
    if decay <= 0:
        return None
    return AveragedModel(student.model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns a timm model's weights as timm knows them: low-rank updates merged, on the CPU, fp32.

    Args:
        model: The student's timm model, or its average; left as it is.
    """
    if isinstance(model, AveragedModel):
        model = model.module
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        model = copy.deepcopy(model)
        for module in list(model.modules()):
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def _recompute_blocks(model: Any) -> None:
    """Makes the backward pass run every block again instead of keeping its activations.

    timm's own switch also saves the state of the random generators, which a CUDA graph forbids; nothing is random here.
    """
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _freeze_unused(student: Backbone) -> None:
    """Turns off the gradient of weights that the patch tokens do not depend on, found by one backward pass."""
    side = 2 * student.info.patch_size
    device = student.mean.device
    student(torch.zeros(1, 3, side, side, device=device)).patch_tokens.sum().backward()
    parameters: dict[str, Any] = dict(student.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
