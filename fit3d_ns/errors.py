"""The one exception that a user's input can cause."""


class UserError(RuntimeError):
    """Bad input, said in one sentence: what is wrong, in which file or flag, and what to do.

    Command-line entry points print the sentence and exit with status 1, without a traceback.
    """
