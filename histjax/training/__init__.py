"""Training: metrics, optimizer, steps, checkpoints and the loop."""
