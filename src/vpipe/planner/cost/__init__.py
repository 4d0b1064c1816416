"""What a stage and a rank take of time and memory, whatever the cuts."""
