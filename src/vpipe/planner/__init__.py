"""What is cut where, what is kept, recomputed or swapped, and what it costs. No torch except in profile."""
