"""What a run takes on a machine that nobody has, from counted work and tables of devices."""
