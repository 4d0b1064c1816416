"""The training loop, its numbers, and the proof that they are right."""
