"""How the members' logits become one row; pure tensors."""
