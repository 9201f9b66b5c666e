"""One package a method: its loop is `decoding.py`, its logits processor `processor.py`."""
