"""The tasks that slimheads proves, and which class of transformers each of them builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.errors import ModelRefusedError, UsageError

# By optimum's names, with the Auto class that loads each. If several Auto classes list an architecture, the first task
# is chosen.
TASKS: dict[str, str] = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "object-detection": "AutoModelForObjectDetection",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForCTC",
    "feature-extraction": "AutoModel",
}
# The same for encoder-decoders, in order of preference. Their other tasks are not proven.
SEQ2SEQ_TASKS: dict[str, str] = {
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}


def auto_classes(config: PretrainedConfig) -> Mapping[str, str]:
    """The proven tasks of this kind of model, with the Auto class that loads each."""
    return SEQ2SEQ_TASKS if config.is_encoder_decoder else TASKS


def task_of(config: PretrainedConfig) -> str:
    """The task of a checkpoint, from its architecture; feature-extraction if that says nothing.

    Raises:
        ModelRefusedError: an encoder-decoder that does not generate text.
    """
    known = auto_classes(config)
    for name in config.architectures or ():
        for task, auto in known.items():
            if name in class_names(auto, config):
                return task
    if not config.is_encoder_decoder:
        return "feature-extraction"
    others = set(config.architectures or ()) - set(class_names("AutoModel", config))
    if others:
        raise ModelRefusedError(
            f"{min(others)} is not covered: only encoder-decoders that generate text are",
            where="config.json",
            hint="name a task that generates text, if that is what the model is for",
        )
    return next(task for task, auto in known.items() if class_names(auto, config))


def class_names(auto: str, config: PretrainedConfig) -> tuple[str, ...]:
    """Names of the classes that an Auto class can build from a configuration, its default first."""
    names = getattr(transformers, auto)._model_mapping._model_mapping.get(config.model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def architecture_of(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    """The class of transformers that is built for a task: the one config.json names, if it fits the task.

    Raises:
        UsageError: this kind of model has no class for the task.
    """
    known = auto_classes(config)
    names = class_names(known[task], config) if task in known else ()
    if not names:
        raise UsageError(f"{config.model_type} has no model for '{task}'", keys=("task",), hint="use task: auto")
    name = next((name for name in config.architectures or () if name in names), names[0])
    return cast(type[PreTrainedModel], getattr(transformers, name))
