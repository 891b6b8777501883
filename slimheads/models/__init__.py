"""Loading and saving of models, their weights, head counts and FLOPs, and greedy generation."""
