"""What each model family is made of: one data file per family, and what reads and applies these."""
