"""Parts of `bench_forks.py`."""
