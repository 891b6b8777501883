"""Other forms of a float32 graph that compute the same, one of which may run faster.

- `optimized`: the plain graph after the optimizations of ONNX Runtime that run on every CPU.
- `attention`: attention and activation as single operators, by ONNX Runtime's transformers optimizer.
- `fused`: the same, and each normalization as one operator with the addition before it. On CPUs that operator can be
  slower than the two, hence the form without it.
- `rewritten`: constants folded and patterns rewritten by onnxscript.

The certificate compares each with the plain graph, over all cases, before it may ship.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType

import onnx
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from transformers import PretrainedConfig

from slimheads.errors import first_line
from slimheads.exporting import graph_files
from slimheads.names import GraphForm
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.onnx_signature import nodes_of
from slimheads.runtime.quiet import quiet

# The optimizer's name for a model type; most are fused as "bert". "gpt2" also drops the reshapes around a Gemm.
_FUSED_AS = MappingProxyType({"gpt2": "gpt2"})


def build_form(name: GraphForm, plain: Path, target: Path, config: PretrainedConfig) -> str | None:
    """Writes another form of a graph, with the same inputs, outputs and metadata.

    Args:
        name: any but "plain".
        plain: the float32 graph as exported.
        target: a file with the same name as `plain`, in an existing folder of its own; external data go beside it.
        config: the configuration of the model.

    Returns:
        None, or why there is no such form; then nothing is written.
    """
    if config.is_encoder_decoder:
        return "an encoder-decoder ships as four graphs, and other forms are made of models with one"
    with quiet(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".form-") as scratch:
        try:
            made = _BUILDERS[name](plain, Path(scratch) / plain.name, config)
        # Third-party passes over arbitrary graphs raise errors of any type (KeyError, AssertionError, ONNX Runtime's
        # own). Each means that this graph has no such form, and the plain one ships.
        except Exception as error:
            return f"it could not be made ({type(error).__name__}: {first_line(error)[:200]})"
        before = onnx.load(str(plain), load_external_data=False)
        if _operators(made) == _operators(before):
            return "it changes nothing in this graph"
        if not _same_interface(before, made):
            return "it removes inputs or outputs of the graph"
        graph_files.save_graph(made, target)
    return None


def _optimized(plain: Path, scratch: Path, _config: PretrainedConfig) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    # The next level writes memory layouts of this CPU into the file, which is slow or does not run on other CPUs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(scratch)
    options.log_severity_level = 4
    if graph_files.graph_bytes(plain) > graph_files.ONE_FILE:
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, f"{scratch.name}_data")
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    return onnx.load(str(scratch))


def _fused(plain: Path, _scratch: Path, config: PretrainedConfig, *, norms: bool = True) -> onnx.ModelProto:
    kind = _FUSED_AS.get(config.model_type, "bert")
    options = FusionOptions(kind)
    # By default the sum of the mask is taken as a number of positions from the left: wrong with padding on the left.
    options.use_raw_attention_mask()
    # It takes the smaller table for the position embeddings, which may be the tokens'.
    options.enable_embed_layer_norm = False
    options.enable_skip_layer_norm = norms
    options.enable_bias_skip_layer_norm = norms
    # With 0, each layer's head count is read from its shapes; any other number would be used for all layers.
    made: onnx.ModelProto = optimize_model(
        str(plain), model_type=kind, num_heads=0, hidden_size=0, optimization_options=options, opt_level=0
    ).model
    return made


def _rewritten(plain: Path, _scratch: Path, _config: PretrainedConfig) -> onnx.ModelProto:
    # Imported late: they take as long to import as a small command takes to run.
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    # Loaded with external data: onnx_ir's own loader would keep references to the plain graph's.
    made: onnx.ModelProto = onnx_ir.to_proto(optimize_for_ort(onnx_ir.from_proto(onnx.load(str(plain))))[0])
    return made


_BUILDERS: dict[GraphForm, Callable[[Path, Path, PretrainedConfig], onnx.ModelProto]] = {
    "optimized": _optimized,
    "attention": partial(_fused, norms=False),
    "fused": _fused,
    "rewritten": _rewritten,
}


def _operators(proto: onnx.ModelProto) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in nodes_of(proto.graph))


def _same_interface(before: onnx.ModelProto, made: onnx.ModelProto) -> bool:
    """Whether all inputs and outputs are there. Their declarations and the metadata are then copied from `before`."""
    for old, new in ((before.graph.input, made.graph.input), (before.graph.output, made.graph.output)):
        if {value.name for value in old} != {value.name for value in new}:
            return False
        del new[:]
        new.extend(old)
    del made.metadata_props[:]
    made.metadata_props.extend(before.metadata_props)
    used = {"", *(node.domain for node in nodes_of(made.graph)), *(f.domain for f in made.functions)}
    kept = [opset for opset in made.opset_import if opset.domain in used]  # ONNX Runtime lists every domain it knows
    del made.opset_import[:]
    made.opset_import.extend(kept)
    return True
