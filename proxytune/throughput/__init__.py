"""What a steered token costs on this machine, compared with a tuned model's (`proxytune bench`)."""
