"""The model families: one data file per family, and the code that reads them and finds the sites."""
