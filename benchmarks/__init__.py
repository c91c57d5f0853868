"""The comparison, its baselines, the papers' tables and the speed measurements. Run ``python -m benchmarks``."""
