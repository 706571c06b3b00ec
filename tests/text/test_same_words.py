"""Phrases that are the same words, and phrases that are not."""

import pytest

from vise_fast.text.same_words import bare, same_words

SAME = [
    ("red cup", "The red cup."),
    ("RED CUP", "red  cup"),
    ("a red-striped cup", "red striped cup"),
    ("an owl", "the owl!"),
    ("Straße", "strasse"),
    ("\ufb01re", "fire"),
    ("cup_2", "cup 2"),
    ("", ""),
    ("The", "the"),
    ("?!", "?!"),
]
DIFFERENT = [
    ("red cup", "red cups"),
    ("red cup", "cup red"),
    ("red cup", "red cup on the table"),
    ("red cup", ""),
    ("theory", "ory"),
    ("the", "a"),
    ("?", "!"),
    ("cup 2", "cup 3"),
]


@pytest.mark.parametrize("one, other", SAME)
def test_case_punctuation_and_articles_say_nothing(one, other):
    assert same_words(one, other) and same_words(other, one)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_other_words_are_others(one, other):
    assert not same_words(one, other) and not same_words(other, one)


def test_what_is_left_of_a_phrase():
    assert bare(" The  RED, (striped) cup of a man. ") == "red striped cup of man"
