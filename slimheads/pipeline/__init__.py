"""The stages of a run in order, their results, and the report that they end in."""
