"""The formula as a logits processor."""
