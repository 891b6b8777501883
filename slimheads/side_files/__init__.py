"""The files that ship beside the weights: tokenizers, sentence-transformers modules, the pooling they declare."""
