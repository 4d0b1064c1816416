"""What each rank does, in which order. Standard library only."""
