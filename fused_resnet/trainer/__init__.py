"""Training from recipes: data, the loop, checkpoints and logs."""
