"""Where weights, KV and activations lie, and how they get there."""
