"""What a steered token costs here, beside a tuned model's (`proxytune bench`)."""
