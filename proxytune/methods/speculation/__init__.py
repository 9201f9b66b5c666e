"""Lossless speculation: a draft proposes tokens, one pass of the model accepts or rejects them, and nothing is lost.

A round is propose → verify → commit (`decoding.py`). A draft token x from q is accepted with probability min(1, p(x) /
q(x)); after a rejection the recovered token comes from the residual relu(p − q), after the last accepted draft the
bonus token comes from p. Source: Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318).

`SpeculativeDecoding` is the loop. Its drafts: the composition's own expert ("expert"), any other model (`ModelDraft`),
text that occurred before (`PromptLookupDraft`), and pairs of tokens (`BigramDraft`).
"""

from proxytune.methods.speculation.decoding import SpeculativeDecoding
from proxytune.methods.speculation.drafts import Draft
from proxytune.methods.speculation.lookup_drafts import BigramDraft, PromptLookupDraft
from proxytune.methods.speculation.model_drafts import ModelDraft
from proxytune.methods.speculation.output import SpeculativeOutput

__all__ = ["BigramDraft", "Draft", "ModelDraft", "PromptLookupDraft", "SpeculativeDecoding", "SpeculativeOutput"]
