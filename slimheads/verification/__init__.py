"""The certificate: proofs of what every file that ships computes. And the drift: figures of its quality."""
