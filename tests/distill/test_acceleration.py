"""The step is compiled where the views pay for it."""

import pytest

from distill.step import Work, choose_acceleration
from fit3d_ns.support.errors import UserError

PHOTO = (37, 56)  # patches of 518x784
SMALL = Work(6_000, [PHOTO] * 50, 384, 12)
LARGE = Work(200_000, [PHOTO] * 50, 384, 12)


def works():
    return True


@pytest.mark.parametrize(
    ("work", "choice", "reason"),
    [
        (SMALL, "graph", "would save 5 s of 6,000 views and take 30"),
        (LARGE, "compile", "saves about 172 s and takes 30"),
        (Work(30_000, [PHOTO], 384, 12), "graph", "would save 26 s"),
        (Work(40_000, [PHOTO], 384, 12), "compile", "saves about 34 s"),
        (Work(40_000, [PHOTO, (56, 37)], 384, 12), "graph", "and take 60"),
        (Work(20_000, [PHOTO], 768, 12), "compile", "saves about 34 s"),
        (Work(10**9, [(30 + side, 40) for side in range(9)], 384, 12), "graph", "9 sizes are too many"),
    ],
)
def test_compiling_is_chosen_where_it_saves_more_than_it_takes(work, choice, reason):
    found, sentence = choose_acceleration("auto", True, 1, work, works)
    assert found == choice and reason in sentence


def test_it_is_never_chosen_where_it_cannot_pay_or_does_not_work():
    def never():
        raise AssertionError("torch.compile was tried")

    assert choose_acceleration("auto", False, 1, LARGE, never)[0] == "none"
    assert choose_acceleration("auto", True, 2, LARGE, never)[0] == "none"
    assert choose_acceleration("auto", True, 1, SMALL, never)[0] == "graph"
    choice, sentence = choose_acceleration("auto", True, 1, LARGE, lambda: False)
    assert choice == "graph" and "does not work here" in sentence


@pytest.mark.parametrize("asked", ["none", "compile", "graph"])
def test_what_is_asked_for_is_done(asked):
    assert choose_acceleration(asked, True, 1, SMALL, works)[0] == asked
    if asked == "graph":
        for cuda, processes in ((False, 1), (True, 2)):
            with pytest.raises(UserError, match="--acceleration graph needs CUDA and a single process"):
                choose_acceleration(asked, cuda, processes, SMALL, works)
