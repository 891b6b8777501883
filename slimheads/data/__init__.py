"""What goes through a model: made inputs, a user's own inputs, and texts."""
