"""What is known of a loss before it is trusted: how torch's own reduce, and if a user's is a mean over samples."""
