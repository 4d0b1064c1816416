"""What a rank holds in memory: the ledger, moves to host memory, and the allocator underneath."""
