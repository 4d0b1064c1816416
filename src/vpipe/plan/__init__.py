"""What runs where, as a value: read by everyone above, and by nobody changed."""
