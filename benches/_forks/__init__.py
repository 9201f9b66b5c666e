"""What `bench_forks.py` is made of."""
