"""From a torch model to ONNX files: the export, other forms of the graph, and other precisions."""
