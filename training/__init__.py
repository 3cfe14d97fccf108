"""What the scripts share: short modules, each with one job. They know the model and the optimizers, but no script."""
