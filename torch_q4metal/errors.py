"""Errors that a user can act on: each is one sentence with the offending value and the way out.

The apps print them as one line and exit with 1; a traceback appears only with ``--debug``.
"""


class Q4MetalError(ValueError):
    """Base of every error that names something the user can change."""


class CheckpointError(Q4MetalError):
    """A weight file, or what it says about itself, is missing, damaged or not supported."""


class ConfigError(Q4MetalError):
    """``config.json`` or ``generation_config.json`` is missing, damaged or asks for the unbuilt."""


class HubError(Q4MetalError):
    """A model could not be fetched from, or found in the cache of, the Hugging Face Hub."""


class TokenizerError(Q4MetalError):
    """The tokenizer or the chat template is missing, damaged or misbehaves."""


class MemoryLimitError(Q4MetalError):
    """The model and its KV cache do not fit into the memory that is there."""


class ContextLengthError(Q4MetalError):
    """A prompt is longer than the context that the model or the KV cache allows."""


class InstructionSetError(Q4MetalError):
    """``Q4METAL_CPU`` names kernels that this build does not have or this CPU can't run."""


class PipelineError(Q4MetalError):
    """The ranks of a pipeline do not fit each other, or one of them cannot be reached."""
