"""Mixtures of embeddings in a token's place."""
