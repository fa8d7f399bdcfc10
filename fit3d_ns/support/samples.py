"""Items chosen and grouped without chance."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Returns items from the middles of equal parts of a sequence, in order; all of them where there are no more.

    Args:
        items: Any number of them.
        count: Most items returned, at least 1.
    """
    if len(items) <= count:
        return list(items)
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]


def hold_out(items: Sequence[Item], share: float) -> tuple[Sequence[Item], Sequence[Item]]:
    """Splits a sequence into what is kept and an evenly spaced part, which stands for the whole of it.

    The end would not: lists are sorted, and their end is one room, one drive or one class.

    Args:
        items: Any number of them.
        share: Of the items to hold out, in (0, 1); at least one is.

    Returns:
        What is kept, maybe nothing, and what is held out, both in order.
    """
    held = evenly_spaced(range(len(items)), max(1, round(len(items) * share)))
    kept = sorted(set(range(len(items))).difference(held))
    return [items[index] for index in kept], [items[index] for index in held]


def batches_of_like(
    items: Sequence[Item], kind: Callable[[Item], Hashable], size: Callable[[Item], int]
) -> list[list[Item]]:
    """Groups items that can be worked on together, in order of their kinds' first appearance.

    Args:
        items: Any number of them.
        kind: What items of one batch have in common, such as a height and width.
        size: Most items of a batch like the given one, at least 1.

    Returns:
        Batches of items of one kind each, in their order.
    """
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    counts = [(group, size(group[0])) for group in groups.values()]
    return [group[start : start + count] for group, count in counts for start in range(0, len(group), count)]
