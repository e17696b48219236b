"""Errors that a user can fix, and texts that are safe to print."""

import unicodedata

# Categories of characters that a terminal obeys or does not show: controls, formats (which reverse the order
# of letters, or have no width), half surrogate pairs (which cannot be printed), separators of lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


class UserError(Exception):
    """Something that the user can fix. Shown as one line, its message, with exit status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, keep=""))


class NotFinite(UserError):
    """A loss, a gradient or logits that are not finite (NaN or infinity)."""


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line so that it fits into another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: str, keep: str = "\n\t") -> str:
    """A text that may be anybody's, as a terminal can show it: what could move the cursor, change the title,
    copy, link, hide or reorder is written as an escape, such as `\\x1b`.

    Args:
        keep: those of these characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _HIDDEN and letter not in keep
        else letter
        for letter in text
    )
