"""The one exception that a user's input can cause, and what readers of files raise on the way to it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

FLAGS = {
    "backbone": "--pipeline.datamanager.backbone",
    "backbone_weights": "--pipeline.datamanager.backbone-weights",
    "backbone_layer": "--pipeline.datamanager.backbone-layer",
    "backbone_norm": "--pipeline.datamanager.backbone-norm",
    "feature_cache_dir": "--pipeline.datamanager.feature-cache-dir",
    "feature_dim": "--pipeline.model.feature-dim",
    "scene_advice": "check --data, and the dataparser named at the end of the command (nerfstudio-data, colmap, ...).",
}
"""What the fields of a sentence are in the words of ``ns-train``, which everything else may replace."""
_FIELD = re.compile(r"\{(" + "|".join(FLAGS) + r")\}")


class UserError(RuntimeError):
    """Bad input, said in one sentence: what is wrong, in which file or flag, and what to do.

    Command-line entry points print the sentence and exit with status 1, without a traceback. What has another name in
    each command stands in the sentence as a field of `FLAGS`, such as ``{backbone_weights}``, and is filled by
    `flags_are`.

    Args:
        sentence: What to say.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.flags: dict[str, str] = {}
        """What fields are filled with; `FLAGS` for those that are not among them."""

    def __str__(self) -> str:
        """Returns the sentence with its fields filled."""
        return _FIELD.sub(lambda field: {**FLAGS, **self.flags}[field[1]], self.args[0])


class DamagedFile(Exception):
    """What is wrong with a file; its text is a clause that a sentence can go on with."""


@contextmanager
def flags_are(**flags: str) -> Iterator[None]:
    """Fills the fields of what is raised in the block, but for those that a block inside it filled.

    Args:
        flags: By the fields of `FLAGS`, what they are called by whoever called: a flag, an argument, or words.

    Raises:
        UserError: That of the block.
    """
    unknown = flags.keys() - FLAGS.keys()
    if unknown:
        raise ValueError(f"no fields of an error: {', '.join(sorted(unknown))}")
    try:
        yield
    except UserError as error:
        error.flags = {**flags, **error.flags}
        raise


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind where it has none.

    Args:
        error: Any exception.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
