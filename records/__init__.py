"""What a run leaves behind in its folder: checkpoints and metrics."""
