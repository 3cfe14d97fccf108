"""The parts of a training step: the optimizer and its schedule, and the estimate of curvature."""
