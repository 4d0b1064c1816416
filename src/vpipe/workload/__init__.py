"""A run's model, data, optimizer and rate, from its configuration."""
