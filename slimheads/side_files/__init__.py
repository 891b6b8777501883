"""The files that ship beside the weights: tokenizers, sentence-transformers modules and the pooling they declare."""
