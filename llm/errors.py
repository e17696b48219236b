"""Errors that a user can fix."""


class UserError(Exception):
    """Something that the user can fix. Shown as one line, its message, with exit status 1."""


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line so that it fits into another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
