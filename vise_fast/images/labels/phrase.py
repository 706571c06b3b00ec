"""What may be asked for: a phrase of somebody's own, as a class name or a query."""

from __future__ import annotations

import unicodedata

LONGEST = 200
"""Characters of a phrase; as many as are read of a model's own query."""
UNWRITABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def phrase(text: object) -> str | None:
    """One line without blanks at its ends; None for what is no text, empty, too long, or holds what
    could be taken for a tag or a turn of the conversation.
    """
    if not isinstance(text, str):
        return None
    line = " ".join(text.split())
    odd = {unicodedata.category(letter) for letter in line} & UNWRITABLE
    if not line or len(line) > LONGEST or odd or set("<>") & set(line):
        return None
    return line
