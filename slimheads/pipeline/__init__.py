"""A run: its stages in order, their results, and the report at the end."""
