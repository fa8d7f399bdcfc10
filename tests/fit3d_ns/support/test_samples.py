import pytest

from fit3d_ns.support.samples import batches_of_like, evenly_spaced, hold_out


@pytest.mark.parametrize("length", [0, 1, 5, 40, 301])
@pytest.mark.parametrize("count", [1, 2, 6, 40])
def test_picks_are_in_order_distinct_and_evenly_spaced(length, count):
    picked = evenly_spaced(range(length), count)
    assert len(picked) == min(length, count) and picked == sorted(set(picked))
    if length > count:
        edges = [-picked[0] - 1, *picked, 2 * length - picked[-1] - 1]  # mirrored at both ends
        gaps = [b - a for a, b in zip(edges, edges[1:])]
        assert max(gaps) - min(gaps) <= 2


@pytest.mark.parametrize(("length", "share", "held"), [(1, 0.1, 1), (2, 0.1, 1), (30, 0.1, 3), (10, 0.96, 10)])
def test_what_is_held_out_is_evenly_spaced(length, share, held):
    kept, held_out = hold_out(range(length), share)
    assert sorted([*kept, *held_out]) == list(range(length)) and len(held_out) == held
    assert held_out == evenly_spaced(range(length), held) and kept == sorted(kept)


def test_batches_hold_like_items_in_order():
    words = ["a", "bb", "c", "dd", "e", "ff", "ggg", "h"]
    batches = batches_of_like(words, kind=len, size=lambda word: 3 if len(word) == 1 else 2)
    assert batches == [["a", "c", "e"], ["h"], ["bb", "dd"], ["ff"], ["ggg"]]
    assert batches_of_like([], kind=len, size=len) == []
