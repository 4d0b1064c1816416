"""Counting what blocks do and hold, on tensors without memory."""
