"""Triton kernels of proxytune: a leaf package that imports torch and triton and nothing of proxytune.

Empty until the fused kernels land; the folder above is deliberately not a package (see `tests/test_packaging.py`).
"""
