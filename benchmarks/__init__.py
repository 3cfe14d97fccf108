"""What bench.py measures."""
