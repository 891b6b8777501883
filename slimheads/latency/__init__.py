"""Latency of the dense and the slim model: samples, intervals, verdicts, latency tables and predictions."""
