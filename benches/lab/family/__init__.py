"""The family of four small Llamas: corpus, tokenizer, training."""
