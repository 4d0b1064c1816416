"""A model as a chain of blocks."""
