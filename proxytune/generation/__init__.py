"""What every loop shares around transformers' `generate()`."""
