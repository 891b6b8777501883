"""The report of a run as data, and the pages, tables and plots made from it."""
