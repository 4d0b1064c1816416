"""How ranks talk: the process group, messages, shared memory, waits, and what is said when one is lost."""
