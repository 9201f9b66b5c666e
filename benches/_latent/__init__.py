"""Parts of `bench_latent.py`."""
