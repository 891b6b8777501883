"""The output folder: which folder may be one, what stages left in it, and how results appear in it at once."""
