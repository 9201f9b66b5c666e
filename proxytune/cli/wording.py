"""What the library says in the terms of Python, in those of the command line.

A message that names a keyword names the option here. What has no option is said as it is.
"""

from __future__ import annotations

import re

__all__ = ["as_options"]

_SAYINGS = tuple(
    (re.compile(python), options)
    for python, options in (
        (
            r"pass members=\{'(\w+)': \{'trust_remote_code': True\}\}, or \w+=True for all members",
            r"pass --trust \1, or --trust all for all members",
        ),
        (
            r"Pass '([^']+)' as the (\w+), with members=.*'gguf_file': '([^']+)'.*; in a recipe, write .*?\}\.",
            r'Name it in a recipe: "\2": {"id": "\1", "load": {"gguf_file": "\3"}}.',
        ),
        (
            r"If it is an encoder, load it as a decoder \(is_decoder=True\)\. self_test=False skips this check",
            "Name a decoder-only model",
        ),
        (r"For the base alone, set alpha=0", "For the base alone, pass --alpha 0"),
        (
            r"pass end_tokens='union' to keep that without this warning, or 'base' or 'expert' to stop at the end "
            r"tokens of that one alone; eos_token_id= of generate\(\) overrides it for a call",
            "pass --end-tokens union to keep that without this warning, or base or expert to stop at the end tokens of "
            "that one alone",
        ),
        (
            r"Pass tokenizers=\{role: tokenizer\}, or check_vocabulary=False if you know that they agree",
            "Save the tokenizer beside the member, with tokenizer.save_pretrained(folder); for one with code of its "
            "own that you trust, pass --trust",
        ),
        (
            r"Load it yourself with AutoModelForImageTextToText\.from_pretrained, and pass the model; it is used for "
            r"text, and as the base for images too",
            "The command line opens causal LMs alone; in Python, pass the loaded model to proxytune.wrap",
        ),
        (
            r"To change the strength, set its alpha; to compose anew, wrap its base, proxytune\.wrap\(model\.base, …\)",
            "To decode with it, pass its folder as --recipe; --alpha changes its strength",
        ),
        (r"pass a plain model as the (\w+), e\.g\. model\.base", r"name a plain model as the \1"),
        (
            r"look at model\.member_logits\(\.\.\.\) on this row's prefix, or pass remove_invalid_values=True",
            "or pass --remove-invalid-values",
        ),
        (
            r", and look at each one's own logits for this text \(model\.member_logits\)\. remove_invalid_values=True",
            ". --remove-invalid-values",
        ),
        (r"Pass pad_token_id= to generate\(\)", "Pass --pad-token-id"),
        (r"Pass e\.g\. \w+Decoding\((\w+)=([^)]+)\)", r"Pass e.g. --\1 \2"),
    )
)


def as_options(text: str) -> str:
    """A message with options in place of the keywords that it names."""
    for python, options in _SAYINGS:
        text = python.sub(options, text)
    return text
