"""The output folder: which folders are accepted, the stored results of stages, and publishing by rename."""
