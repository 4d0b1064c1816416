"""Who waits for whom: what every rank is doing, and what can be said of a wait that lasts."""
