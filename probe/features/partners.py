"""The fine-tuned backbones that a table compares with their original, and what their cards ask of the probe."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fit3d_ns.backbones import BackboneSpec, FineTuned, describe_backbone, find_fine_tuned
from fit3d_ns.backbones.students.result_folder import CARD_NAME, README_NAME, add_probe
from fit3d_ns.support.errors import UserError, flags_are

_LOGGER = logging.getLogger(__name__)
DEFAULT_BACKBONE = "dinov2_small"
TUNED, CONTROL = "tuned", "control"
_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9-]*)=(.+)")


@dataclass(frozen=True)
class Partner:
    """A fine-tuned backbone of the table."""

    name: str
    """Unique: that of its group, numbered from the second on."""
    group: str
    """Students of one recipe, which differ in their seed alone, share rows."""
    role: Literal["tuned", "control"]
    """Which flag named it."""
    found: FineTuned
    """Where its weights are, and what its card says."""

    @property
    def flag(self) -> str:
        """What the user calls it."""
        return f"--{self.role} {self.found.source}"


def find_partners(tuned: Sequence[str], control: Sequence[str]) -> tuple[Partner, ...]:
    """Finds the fine-tuned backbones that a user names.

    Args:
        tuned: ``[NAME=]SOURCE`` of each student; see `find_fine_tuned` for what a source may be.
        control: Likewise of students of targets without 3D.

    Returns:
        The backbones in the order given, students first.

    Raises:
        UserError: If there is no such backbone, its card cannot be read, one is named twice, or controls are given
            without a student.
    """
    if control and not tuned:
        raise UserError("--control compares with a fine-tuned backbone: give that with --tuned PATH.")
    partners: list[Partner] = []
    roles: tuple[tuple[Literal["tuned", "control"], Sequence[str]], ...] = (("tuned", tuned), ("control", control))
    for role, sources in roles:
        for text in sources:
            named = _NAMED.fullmatch(str(text))
            group, source = (named[1], named[2]) if named else (role, text)
            if any(partner.group == group and partner.role != role for partner in partners):
                raise UserError(f"--{role} {text}: {group} is a name of --tuned already, choose another.")
            found = find_fine_tuned(str(source), f"--{role}")
            if any(partner.found.weights.resolve() == found.weights.resolve() for partner in partners):
                raise UserError(f"--{role} {text} is given twice: name each fine-tuned backbone once.")
            number = 1 + sum(partner.group == group for partner in partners)
            partners.append(Partner(group if number == 1 else f"{group}.{number}", group, role, found))
    return tuple(partners)


def note_in_model_cards(partners: Sequence[Partner], title: str, table: Path) -> None:
    """Adds a probe's table to the model card of each student whose result folder is on this machine.

    Args:
        partners: The fine-tuned backbones.
        title: Of the probe.
        table: The probe's table.md.
    """
    lines = table.read_text().splitlines()[2:-1]  # neither title nor command
    for partner in partners:
        folder = partner.found.weights.parent
        if not (folder / README_NAME).is_file() or not (folder / CARD_NAME).is_file():
            continue
        try:
            _LOGGER.info("Model card: %s", add_probe(folder, title, "\n".join(lines)))
        except UserError as error:
            _LOGGER.warning("The model card of %s was not changed: %s", folder, error)


def require_one_each(partners: Sequence[Partner], probe: str) -> None:
    """Refuses several students of one group where a probe cannot take a mean over them.

    Args:
        partners: All fine-tuned backbones of the table.
        probe: What cannot, for the sentence.

    Raises:
        UserError: If there are.
    """
    for partner in partners:
        if partner.name != partner.group:
            raise UserError(
                f"{partner.flag} is another {partner.group}, and {probe} takes no mean over students: give it a name "
                f"of its own, as in --{partner.role} other={partner.found.source}, or leave it out."
            )


@flags_are(backbone="--backbone", backbone_weights="--backbone-weights", backbone_layer="--layer")
def choose_spec(
    backbone: str | None,
    weights: Path | None,
    layer: int | None,
    norm: bool | None,
    normalization: Literal["imagenet", "own"] | None,
    partners: Sequence[Partner],
    default_norm: bool | None = None,
) -> tuple[BackboneSpec, str]:
    """Decides how features are taken: as the flags say, else as the students were trained, else by default.

    Args:
        backbone: ``--backbone``, if given; `DEFAULT_BACKBONE` by default.
        weights: ``--backbone-weights``, if given.
        layer: ``--layer``, if given; the last by default.
        norm: ``--final-norm``, if given; on by default.
        normalization: ``--normalization``, if given; ImageNet's by default, as in the paper.
        partners: The students, whose cards count.
        default_norm: The norm of a protocol that knows better than a card, as the paper's depth probe does.

    Returns:
        The original's spec, and a sentence that says what was taken and from where.

    Raises:
        UserError: If a card contradicts a flag or another card.
    """
    known = next((partner for partner in partners if partner.found.original is not None), None)
    card = known.found.original if known else None
    if known is None or card is None:
        chosen = BackboneSpec(
            backbone or DEFAULT_BACKBONE,
            weights,
            layer,
            _first(norm, default_norm, True),
            normalization or "imagenet",
        )
        return chosen, _sentence(chosen, "no card says otherwise")
    chosen = BackboneSpec(
        backbone or card.name,
        weights,
        card.layer if layer is None else layer,
        _first(norm, default_norm, card.norm),
        normalization or card.normalization,
    )
    for partner in partners:
        _check_card(partner, chosen, default_norm is None)
    return chosen, _sentence(chosen, f"as {known.found.source} was fine-tuned")


def check_original(partner: Partner, identity: dict, flag: str = "--backbone-weights") -> None:
    """Refuses an original that is not the one a student was fine-tuned from.

    Args:
        partner: The student.
        identity: Of the original as loaded.
        flag: What names the original's weights.

    Raises:
        UserError: If the card's hash is another.
    """
    if partner.found.original_sha256 not in (None, identity["weights_sha256"]):
        raise UserError(
            f"{partner.flag} was fine-tuned from other weights than those of {identity['name']} here (their hashes "
            f"differ): name the file that it started from with {flag}."
        )


def _check_card(partner: Partner, chosen: BackboneSpec, norm_counts: bool) -> None:
    card = partner.found.original
    if card is None:
        return
    own = describe_backbone(card)
    if own.timm_id != describe_backbone(replace(chosen, layer=None)).timm_id:
        raise UserError(
            f"{partner.flag} was fine-tuned from {own.name}, not from {chosen.name}: leave --backbone out, or give "
            f"--backbone {own.name}."
        )
    info = describe_backbone(chosen)
    facts: list[tuple[str, object, object]] = [("--layer", info.layer, own.layer)]
    if (list(info.mean), list(info.std)) != (list(own.mean), list(own.std)):
        facts.append(("--normalization", chosen.normalization, card.normalization))
    if norm_counts:
        facts.append(("--final-norm", _switch(chosen.norm), _switch(card.norm)))
    for flag, taken, trained in facts:
        if taken != trained:
            raise UserError(
                f"{partner.flag} was fine-tuned with {flag} {trained} (its card says), and {flag} {taken} would read "
                f"what was not trained: leave {flag} out, and probe students of different cards one by one."
            )


def _sentence(spec: BackboneSpec, source: str) -> str:
    info = describe_backbone(spec)
    norm = "after" if spec.norm else "before"
    whose = "ImageNet's" if spec.normalization == "imagenet" else "its own"
    return (
        f"Features of {info.name}: block {info.layer} of 0 to {info.num_layers - 1}, {norm} the final norm, photos "
        f"normalised with {whose} mean and std ({source})."
    )


def _switch(value: bool) -> str:
    return "on" if value else "off"


def _first(*values: bool | None) -> bool:
    return next(value for value in values if value is not None)
