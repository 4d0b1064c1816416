"""Text into training sets."""
