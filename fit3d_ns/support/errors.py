"""The one exception that a user's input can cause, and what readers of files raise on the way to it."""


class UserError(RuntimeError):
    """Bad input, said in one sentence: what is wrong, in which file or flag, and what to do.

    Command-line entry points print the sentence and exit with status 1, without a traceback.
    """


class DamagedFile(Exception):
    """What is wrong with a file; its text is a clause that a sentence can go on with."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
