"""The stages: one file each, with the result that it leaves."""
