"""demem: find and remove spurious memorization while a network trains."""

__version__ = "0.1.0"
