"""Whether two phrases are the same words: case, punctuation and articles say nothing.

Left out: synonyms, plurals and the order of words; articles of other languages than English.

Run: `pytest tests/text/test_same_words.py`.
"""

from __future__ import annotations

import re
import unicodedata

ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"[^\W_]+")


def bare(phrase: str) -> str:
    """The phrase's words in small letters, one blank between them, without articles. One of
    articles or punctuation alone stays as it is, in small letters.
    """
    small = " ".join(unicodedata.normalize("NFKC", phrase).casefold().split())
    words = [word for word in _WORD.findall(small) if word not in ARTICLES]
    return " ".join(words) or small


def same_words(one: str, other: str) -> bool:
    """Whether two phrases are the same, but for case, punctuation and articles."""
    return bare(one) == bare(other)
