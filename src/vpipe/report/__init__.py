"""What happened, drawn and explained."""
