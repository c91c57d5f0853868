"""The two papers' experiments."""
