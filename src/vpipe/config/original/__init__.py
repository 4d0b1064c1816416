"""The flat keys and stage maps of the original system."""
