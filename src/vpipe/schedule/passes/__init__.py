"""What turns one schedule into another: messages, recomputation ahead of time, moves to host memory."""
