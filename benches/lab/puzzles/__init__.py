"""Tasks with several solutions, all known, and small models trained on them."""
