"""What `bench_latent.py` is made of."""
