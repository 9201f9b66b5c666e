"""The torch implementation of a decision; files are named as those of the kernels."""
