"""What the model card says of loading: the classes for each task, the title, and which clients cannot run the files."""

from __future__ import annotations

from slimheads.report.model import ModelFacts, Report

# task -> (class in transformers, class in optimum.onnxruntime)
LOADERS = {
    "feature-extraction": ("AutoModel", "ORTModelForFeatureExtraction"),
    "text-generation": ("AutoModelForCausalLM", "ORTModelForCausalLM"),
    "fill-mask": ("AutoModelForMaskedLM", "ORTModelForMaskedLM"),
    "text-classification": ("AutoModelForSequenceClassification", "ORTModelForSequenceClassification"),
    "token-classification": ("AutoModelForTokenClassification", "ORTModelForTokenClassification"),
    "question-answering": ("AutoModelForQuestionAnswering", "ORTModelForQuestionAnswering"),
    "image-classification": ("AutoModelForImageClassification", "ORTModelForImageClassification"),
    "zero-shot-image-classification": (
        "AutoModelForZeroShotImageClassification",
        "ORTModelForZeroShotImageClassification",
    ),
    "object-detection": ("AutoModelForObjectDetection", "ORTModelForCustomTasks"),
    "audio-classification": ("AutoModelForAudioClassification", "ORTModelForAudioClassification"),
    "automatic-speech-recognition": ("AutoModelForCTC", "ORTModelForCTC"),
}
SEQ2SEQ_LOADERS = {
    "text2text-generation": ("AutoModelForSeq2SeqLM", "ORTModelForSeq2SeqLM"),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "ORTModelForSpeechSeq2Seq"),
}

# what a model is fed -> (class in transformers that prepares it, what to call one)
PREPARERS = {
    "text": ("AutoTokenizer", "tokenizer"),
    "image": ("AutoImageProcessor", "processor"),
    "text and image": ("AutoProcessor", "processor"),
    "waveform": ("AutoFeatureExtractor", "processor"),
    "spectrogram": ("AutoFeatureExtractor", "processor"),
}


def loader(model: ModelFacts) -> tuple[str, str]:
    """The classes that load the slim model in transformers and in optimum."""
    return (SEQ2SEQ_LOADERS if model.encoder_decoder else LOADERS)[model.task]


def preparer(model: ModelFacts) -> tuple[str, str]:
    """The class that prepares its inputs, and what to call one. A model that transcribes has a tokenizer as well."""
    return PREPARERS["text and image" if model.task == "automatic-speech-recognition" else model.inputs]


def short_name(source: str) -> str:
    """A title from a path, a package folder or a hub id."""
    parts = source.removeprefix("pkg://").rstrip("/").split("/")
    if source.startswith("pkg://") or (parts[-1] in ("model", "checkpoint", "slim") and len(parts) > 1):
        return parts[0] if source.startswith("pkg://") else parts[-2]  # the folder's own name says nothing
    return parts[-1] or source


def static_axes(report: Report) -> bool:
    """Whether the slim graph has a cache with static axes, which optimum cannot run."""
    export = report.recipe.get("export")
    static = isinstance(export, dict) and export.get("kv_axes") == "static"
    return static and (report.model.task == "text-generation" or report.model.encoder_decoder)
