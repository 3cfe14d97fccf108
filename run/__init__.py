"""One run on this machine: its settings, its device, its ranks, and how it ends."""
