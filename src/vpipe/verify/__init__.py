"""Proof that a run computes what one process computes."""
