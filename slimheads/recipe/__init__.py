"""The recipe: its keys, its errors with line and column, and how one is written."""
