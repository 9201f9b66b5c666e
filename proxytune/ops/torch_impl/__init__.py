"""The torch implementation of a decision; file names are those of the kernels."""
