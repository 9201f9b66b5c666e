"""Lossless speculation: a draft runs ahead, the model verifies."""
