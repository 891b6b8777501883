"""The certificate, which proves what every shipped file computes, and drift, which measures its quality."""
