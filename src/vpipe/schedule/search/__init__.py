"""The search for the best order under given costs and a memory limit."""
