"""The built-in models, as chains of blocks."""
