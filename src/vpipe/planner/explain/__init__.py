"""Plans, estimates and profiles as text."""
