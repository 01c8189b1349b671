"""The one exception that commands turn into a single clear line, and what they warn of."""


class UserError(ValueError):
    """Something the user can put right: a flag, a file or a record.

    The message is one line that names what is at fault and, where known, what to do. The command line
    prints it without a traceback and exits with 1; Python callers catch it as a `ValueError`.
    """


class UnknownTokensWarning(UserWarning):
    """The text encoder's vocabulary lacks much of the captions, or a part of a prompt."""


class CutTextWarning(UserWarning):
    """A prompt is longer than the text that a stage takes."""
