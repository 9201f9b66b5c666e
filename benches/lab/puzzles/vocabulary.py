"""The puzzles' shared vocabulary as named token ids, and its tokenizer.

Every token is one word, and words are separated by blanks, so a puzzle's text and its ids correspond one to one:

    <bos> <countdown> 3 4 5 7 <answer> <think> 3 * 4 = 12 ; 12 - 5 = 7 </think> 4 * 3 = 12 ; 12 - 5 = 7 <eos>

Padding is 0 and the end of text 1, as in the lab's other models.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = [
    "ANSWER",
    "BLANK",
    "BOS",
    "COLOURING",
    "COLOURS",
    "COLUMNS",
    "COUNTDOWN",
    "EOS",
    "EQUALS",
    "LARGEST_NUMBER",
    "MARK",
    "NEXT_ATTEMPT",
    "NEXT_STEP",
    "NUMBER",
    "OPERATORS",
    "PAD",
    "QUEENS",
    "THINK_BEGIN",
    "THINK_END",
    "WORDS",
    "build_puzzle_tokenizer",
]

LARGEST_NUMBER = 99
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<colouring>", "<queens>", "<countdown>", "<answer>")
_COLOURS = ("red", "green", "blue")
_COLUMNS = ("a", "b", "c", "d", "e", "f")

WORDS: tuple[str, ...] = (
    *_SPECIAL,
    *("<think>", "</think>"),
    *(".", "#"),
    *_COLOURS,
    *_COLUMNS,
    *("+", "-", "*", "=", ";", "|"),
    *map(str, range(LARGEST_NUMBER + 1)),
)
"""All tokens; a token's id is its index here."""

PAD, EOS, BOS, COLOURING, QUEENS, COUNTDOWN, ANSWER = range(len(_SPECIAL))
THINK_BEGIN, THINK_END = WORDS.index("<think>"), WORDS.index("</think>")
BLANK, MARK = WORDS.index("."), WORDS.index("#")
"""The two values of a bit: no edge or an edge, a free square or a blocked one."""
COLOURS: tuple[int, ...] = tuple(map(WORDS.index, _COLOURS))
COLUMNS: tuple[int, ...] = tuple(map(WORDS.index, _COLUMNS))
OPERATORS: tuple[int, ...] = tuple(map(WORDS.index, "+-*"))
EQUALS, NEXT_STEP, NEXT_ATTEMPT = map(WORDS.index, "=;|")
NUMBER = WORDS.index("0")
"""The id of the number 0; that of `n` is `NUMBER + n`."""


def build_puzzle_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer, split at blanks, with left padding and without an unknown token.

    `<think>` and `</think>` are ordinary tokens, so decoding with `skip_special_tokens=True` keeps them.
    """
    backend = Tokenizer(models.WordLevel(vocab={word: index for index, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
