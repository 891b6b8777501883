"""How fast dense and slim models are: samples, intervals, verdicts, latency tables and predictions."""
