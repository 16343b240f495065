"""Training, as all stages do it: losses, a step of the weights, validation."""
