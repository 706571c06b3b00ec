"""Verdict words under the merges of Qwen's own tokenizer: every spelling that is one token counts,
for yes and no alike.
"""

import base64
import subprocess
import sys
import zipfile

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vise_fast.text.prompts import NATURAL
from vise_fast.text.tokens import Tokens

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen's tokenizers cut a text before they merge."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PACKAGE = "dashscope==2.0.2"
SMALL = [
    *(("vi", "s"), ("vis", "i"), ("visi", "b"), ("visib", "l"), ("visibl", "e"), ("v", "i")),
    *(("y", "e"), ("ye", "s"), ("Y", "e"), ("Ye", "s"), ("Y", "E"), ("YE", "S")),
    *(("n", "o"), ("N", "o"), ("N", "O"), (">", "No")),
]
"""Merges that end as Qwen's do for these words, and for nothing else."""


def bpe(vocabulary, merges):
    """A byte-level tokenizer that cuts as Qwen's do."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    return Tokens(fast, NATURAL, len(tokenizer.get_vocab()), image_token=0)


@pytest.fixture(scope="module")
def small():
    """The merges that matter."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in SMALL)]
    return bpe({word: index for index, word in enumerate(words)}, SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of Qwen's merges, from a package that ships them."""
    place = tmp_path_factory.mktemp("qwen")
    words = ["download", "-q", "--no-deps", "--retries=0", "--timeout=10", f"--dest={place}"]
    got = subprocess.run([sys.executable, "-m", "pip", *words, PACKAGE], capture_output=True)
    if got.returncode != 0:
        pytest.skip(f"{PACKAGE} cannot be had here; the small tokenizer has the merges in question")
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        lines = wheel.read("dashscope/resources/qwen.tiktoken").splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    return bpe(*_as_merges(ranks))


def _as_merges(ranks):
    """(vocabulary, merges) of a byte-level BPE that is written as the rank of each token."""
    letter = _letters()
    named = {"".join(letter[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for name in sorted(named, key=named.get):
        cuts = [(name[:i], name[i:]) for i in range(1, len(name))]
        known = [cut for cut in cuts if cut[0] in named and cut[1] in named]
        merges += sorted(known, key=lambda cut: (named[cut[0]], named[cut[1]]))
    return named, merges


def _letters():
    """The letter that stands for each byte (GPT-2): itself where it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@pytest.fixture(params=["small", "whole"])
def tokens(request):
    return request.getfixturevalue(request.param)


def said(tokens, ids):
    return {tokens.tokenizer.decode([token]) for token in ids}


def test_no_merges_with_the_bracket_and_yes_does_not(tokens):
    """What makes the border matter."""
    assert said(tokens, tokens.ids("<visible>No")[-1:]) == {">No"}
    assert said(tokens, tokens.ids("<visible>Yes")[-1:]) == {"Yes"}
    assert said(tokens, tokens.opening[-1:]) == {">"}


def test_every_spelling_counts_on_both_sides(tokens):
    assert said(tokens, tokens.yes) == {"yes", "Yes", "YES"}
    assert said(tokens, tokens.no) == {"no", "No", "NO"}
    assert len(tokens.yes) == len(tokens.no) == 3
