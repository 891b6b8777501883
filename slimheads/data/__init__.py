"""Model inputs: generated ones, the user's own, and texts."""
