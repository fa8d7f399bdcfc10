"""Which views are held out: the lists that a scene names, and what is said where there are none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fit3d_ns.support.errors import UserError

SPLITS = ("train", "val", "test")
HOLD_OUT = (
    "hold some out with `nerfstudio-data --eval-mode interval` at the end of the command (10 photos are the fewest of "
    "which the default, --train-split-fraction 0.9, holds one out)"
)
"""How a scene gets held-out views; without a full stop."""
_ADD = "add one of them (an empty one holds nothing out)"


def complete_lists(
    lists: dict[str, Any], names: dict[str, str], source: str, remedy: str = _ADD
) -> dict[str, list[str]]:
    """Completes the lists of views that a scene names: val and test stand for each other.

    Args:
        lists: What is given for ``train``, ``val`` and ``test``; None where nothing is. An empty list of one kind of
            held-out views does not stand in the way of the other.
        names: What each list is called in the scene, for sentences.
        source: File or folder that names them, for sentences.
        remedy: What to do where nothing is said of held-out views; without a full stop.

    Returns:
        All three lists; none if the scene names none.

    Raises:
        UserError: Naming the list that is missing, or is no list of names.
    """
    given = {split: lists[split] for split in SPLITS if lists.get(split) is not None}
    for split, listed in given.items():
        if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
            raise UserError(f"{names[split]} of {source} is no list of file names: mend it.")
    if not given:
        return {}
    if "train" not in given:
        raise UserError(
            f"{source} names {names[next(iter(given))]} but no {names['train']}: add the list, or remove the other."
        )
    if "val" not in given and "test" not in given:
        raise UserError(f"{source} names {names['train']} but neither {names['val']} nor {names['test']}: {remedy}.")
    val, test = given.get("val") or [], given.get("test") or []
    return {"train": given["train"], "val": val or test, "test": test or val}


def check_listed(
    lists: Mapping[str, list[str] | None], known: Sequence[str], names: dict[str, str], source: str
) -> None:
    """Checks that each listed view is one of the scene.

    Args:
        lists: As given to `complete_lists`, which accepted them.
        known: The scene's views, spelled as in the lists.
        names: See `complete_lists`.
        source: See `complete_lists`.

    Raises:
        UserError: Naming list and view.
    """
    paths = {Path(name) for name in known}
    for split, listed in lists.items():
        for name in listed or ():
            if Path(name) not in paths:
                raise UserError(f"{names[split]} of {source} names {name}, which is no view of the scene: correct it.")


def list_remarks(lists: Mapping[str, list[str]], known: Sequence[str], source: str) -> list[str]:
    """Returns sentences on lists that are possible, but rarely meant.

    Args:
        lists: Of `complete_lists`; none if the scene names none.
        known: The scene's views, spelled as in the lists.
        source: File or folder that names the lists.
    """
    if not lists:
        return []
    train, held_out = ({Path(name) for split in splits for name in lists[split]} for splits in (("train",), SPLITS[1:]))
    both, unlisted = sorted(train & held_out), sorted({Path(name) for name in known} - train - held_out)
    remarks = []
    if both:
        remarks.append(
            f"{source} lists {len(both)} of {len(held_out)} held-out views for training too ({both[0]}): scores of "
            "those are no scores of unseen views."
        )
    if unlisted:
        remarks.append(
            f"{source} lists {len(unlisted)} of {len(known)} views nowhere ({unlisted[0]}): they are left out."
        )
    return remarks


def check_hold_out(config: Any) -> None:
    """Checks the numbers by which a dataparser holds views out.

    Args:
        config: Of the dataparser; one without such numbers passes.

    Raises:
        UserError: Naming the flag.
    """
    fraction, interval = getattr(config, "train_split_fraction", 1.0), getattr(config, "eval_interval", 1)
    if not 0 < fraction <= 1:
        raise UserError(f"--train-split-fraction is {fraction:g}: name the share to train on, above 0 and up to 1.")
    if interval < 1:
        raise UserError(f"--eval-interval is {interval}: every how many views is one held out? Name 1 or more.")


def read_list(folder: Path, names: Sequence[str]) -> tuple[str, list[str]] | None:
    """Reads a list of views, one a line.

    Args:
        folder: The scene.
        names: What the file may be called; the first that is there is read.

    Returns:
        The file's name and its lines without blanks around them and without empty ones; None if there is none.

    Raises:
        UserError: If it cannot be read.
    """
    for name in names:
        path = folder / name
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                raise UserError(f"The list {path} cannot be read ({error}): restore it, or remove it.") from error
            return name, [line.strip() for line in lines if line.strip()]
    return None


def nothing_held_out(data: Path) -> str:
    """Returns the sentence for those who need held-out views of a scene without any.

    Args:
        data: The scene.
    """
    return f"No view of the scene {data} is held out for evaluation: train it again and {HOLD_OUT}."
