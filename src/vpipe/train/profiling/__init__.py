"""Measuring what a model's blocks, its optimizer and a machine's links cost."""
