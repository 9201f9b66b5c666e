"""Parts of `bench_gate.py`."""
