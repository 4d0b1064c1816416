"""What is wrong with a run, beyond the type of a value: all of it at once."""
