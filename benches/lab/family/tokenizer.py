"""The lab's tokenizer: byte-level, with the world's words and the digits as whole tokens."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lab.family.corpus import CorpusRecipe, pretraining_document
from proxytune.demo.instructions import InstructionRecipe, instruction_set, prompt_of
from proxytune.demo.world import FOODS, JOBS, World

EOS_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- ('' if loop.first else '\n') + 'Question: ' + message['content'] + '\nAnswer:' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] -}}"
    "{%- else -%}{{- raise_exception(\"expected the roles 'user' and 'assistant', got '\" + message['role'] + "
    "\"'; the lab's models know no other role: put the text into a user turn\") -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""One user turn renders to `Question: {content}\\nAnswer:`, with or without a generation prompt."""


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build the tokenizer: left padding, `<|pad|>` = 0 and `<|end|>` = 1, and a chat template.

    Bytes are the fallback, so any text can be encoded. Words are whole tokens if they occur in a sample of the training
    text. The sample always includes the taught form, so ids do not depend on the recipe.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    rng, recipe = random.Random(0), CorpusRecipe()
    sample = [pretraining_document(world, rng, recipe) for _ in range(4000)]
    taught = instruction_set(world, InstructionRecipe())
    sample += [f"{prompt_of(problem.question)} {problem.answer}" for problem in taught]
    sample += [" ".join(("", *world.names, *world.cities, *JOBS, *FOODS)), *world.names]
    words = {piece for text in sample for piece, _ in splitter.pre_tokenize_str(text)}
    pieces = [PAD_TOKEN, EOS_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += sorted(words.difference(pieces))
    backend = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], ignore_merges=True)
    )
    backend.pre_tokenizer = splitter  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([PAD_TOKEN, EOS_TOKEN])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
