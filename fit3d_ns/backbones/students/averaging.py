"""Weights of a student averaged with those of its original (WiSE-FT, arXiv 2109.01903): no training, no cost at use."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fit3d_ns.backbones.identity import hash_state_dict, load_weights, spec_of_identity
from fit3d_ns.backbones.spec import Assembly
from fit3d_ns.backbones.students.result_folder import (
    DINOV2_NAME,
    HALF_NAME,
    ONNX_NAME,
    STUDENT_NAME,
    TRANSFORMERS_NAME,
    WEIGHTS_NAME,
    read_card,
    write_model_card,
    write_weights,
)
from fit3d_ns.backbones.weights.finding import find_weights
from fit3d_ns.backbones.weights.state_dicts import read_state_dict
from fit3d_ns.support.errors import UserError, flags_are


def interpolate(student: Mapping[str, Tensor], original: Mapping[str, Tensor], amount: float) -> dict[str, Tensor]:
    """Averages every tensor of two state dicts: ``amount * student + (1 - amount) * original``.

    Args:
        student: Fine-tuned weights by name; low-rank updates merged.
        original: The weights before fine-tuning, of the same names and shapes.
        amount: Share of the student, in [0, 1]. 0 gives the original and 1 the student, bit for bit.

    Returns:
        New tensors with the student's names, types and devices; computed in fp32 (float64 in float64). Tensors that
        are not floating-point (counters, index tables) are the student's, or the original's where ``amount`` is 0.

    Raises:
        UserError: If ``amount`` is outside [0, 1], or a tensor is missing in one of the two or has another shape.
    """
    check_amount(amount)
    _check_same_architecture(student, original)
    if amount in (0, 1):
        return {name: tensor.detach().clone() for name, tensor in (student if amount == 1 else original).items()}
    averaged = {}
    for name, tuned in student.items():
        if tuned.is_floating_point():
            before = original[name].detach().to(tuned.device)
            exact = tuned.detach().double() if tuned.element_size() == 8 else tuned.detach().float()
            averaged[name] = before.to(exact.dtype).lerp(exact, amount).to(tuned.dtype)  # equal weights stay equal
        else:
            averaged[name] = tuned.detach().clone()
    return averaged


def check_amount(amount: float) -> None:
    """Refuses an amount outside [0, 1], and NaN.

    Args:
        amount: Share of the student in the average.

    Raises:
        UserError: If it is.
    """
    if not 0 <= amount <= 1:
        raise UserError(f"--interpolate {amount}: give a number from 0 (the original) to 1 (the student).")


def default_assembly(amount: float) -> Assembly:
    """Returns how a result is used unless its reader says otherwise.

    An averaged student is as good alone as beside the original; one that was not averaged is better beside it, which
    is also how the paper uses it.

    Args:
        amount: Share of the student in the average, in [0, 1].
    """
    return "tuned" if amount < 1 else "concat"


def average_result(folder: Path, amount: float, original_weights: Path | None = None) -> list[Path]:
    """Averages a finished result folder anew; takes the weights alone: no photos, no scenes, no GPU.

    The un-averaged student stays in the folder, so this can be repeated with any amount, and after being killed. The
    layouts that the folder holds (half precision, DINOv2's, transformers', ONNX) are made anew too.

    Args:
        folder: What ``fit3d-distill`` wrote, averaged or not, of this version or an earlier one.
        amount: Share of the student, in [0, 1].
        original_weights: Weight file of the original, if it is not the one its name stands for.

    Returns:
        The files written: weights first.

    Raises:
        UserError: If the amount is outside [0, 1], the folder is none of a finished training, its student or the
            original's weights are not those of the card, or the disk refuses.
    """
    check_amount(amount)
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: name one that fit3d-distill wrote.")
    card = read_card(folder)
    student = _read_student(folder, card.get("student_sha256", card["weights_sha256"]))
    spec = spec_of_identity(card["student"], original_weights)
    with flags_are(
        backbone="the student's name in card.json",
        backbone_weights="--original-weights",
        backbone_layer="the layer in card.json",
    ):
        original = load_weights(spec, find_weights(spec))
    if hash_state_dict(original) != card["student"]["weights_sha256"]:
        what = f"{original_weights} does not hold" if original_weights else f"What {spec.name} stands for is not"
        raise UserError(
            f"{what} the weights that {folder} was fine-tuned from (their hashes differ): name the file that does with "
            "--original-weights."
        )
    card |= {"interpolate": amount, "assembly": default_assembly(amount)}
    half, dinov2, transformers, onnx = (
        (folder / name).exists() for name in (HALF_NAME, DINOV2_NAME, TRANSFORMERS_NAME, ONNX_NAME)
    )
    averaged = interpolate(student, original, amount)
    files = write_weights(folder, student, averaged, card, half, dinov2, transformers, onnx)
    return [*files, write_model_card(folder)]


def _read_student(folder: Path, expected: str) -> dict[str, Tensor]:
    """Returns the un-averaged weights: of their own file, or of the result where nothing was averaged so far."""
    for name in (STUDENT_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            weights = read_state_dict(folder / name)
            if hash_state_dict(weights) == expected:
                return weights
    raise UserError(
        f"{folder} does not hold the student that its card.json describes (neither {STUDENT_NAME} nor {WEIGHTS_NAME} "
        "has that hash): copy the folder again from the training."
    )


def _check_same_architecture(student: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> None:
    for name in (*student, *original):
        if name not in student or name not in original:
            difference = f"'{name}' is only in the {'original' if name in original else 'student'}"
        elif student[name].shape != original[name].shape:
            difference = f"'{name}' has shape {tuple(student[name].shape)} and {tuple(original[name].shape)}"
        else:
            continue
        raise UserError(
            f"Student and original are of different architectures ({difference}): average a student with the "
            "backbone that it was fine-tuned from."
        )
