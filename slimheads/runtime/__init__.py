"""ONNX Runtime and this machine: sessions, inputs and outputs of a graph, CPU features, memory, environment."""
