"""What proves without running it that a schedule is legal and cannot hang."""
