"""What a person sees in a terminal or a log: progress on stderr, tables on stdout."""
