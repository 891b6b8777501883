"""`python -m slimheads`."""

from slimheads.cli import main

main()
