"""How long a schedule takes under given costs, and where the time goes."""
