"""The parts of a run: its start, the optimizer and its schedule, curvature, data parallelism, and the meter."""
