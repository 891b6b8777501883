"""The recipe: its keys and defaults, errors with line and column, and how a recipe is written."""
