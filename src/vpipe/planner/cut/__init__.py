"""Where a chain is cut."""
