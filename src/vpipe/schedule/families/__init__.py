"""The schedules made by hand: a file for each family, and what they share."""
