"""Logits processors: real `transformers.LogitsProcessor`s, dropped into any `generate(logits_processor=…)`."""
