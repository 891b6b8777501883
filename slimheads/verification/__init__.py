"""The certificate, which proves what every file that ships computes, and the drift, which measures its quality."""
