"""The runtime: load a bundle and generate with it. Importing it needs neither torch nor the compiler.

from coreinfer import runtime

engine = runtime.load("build/demo-bundle")
print(engine.generate("What is the capital of France?").text)
"""

from coreinfer.bundles import (
    BundleCorrupt,
    BundleError,
    BundleNotFound,
    BundleVersionError,
    ConfigError,
    ContextTooLong,
    CoreInferError,
    GenerationCancelled,
    ModelOutputError,
)

from .conversation import Conversation
from .engine import Engine, load
from .generation import Drafting, Generation, Mode, PathStep, Token, TopLogprob, collect
from .load_options import LoadOptions
from .options import GenerationOptions
from .prompts.tools import ToolCall

__all__ = [
    "BundleCorrupt",
    "BundleError",
    "BundleNotFound",
    "BundleVersionError",
    "ConfigError",
    "ContextTooLong",
    "Conversation",
    "CoreInferError",
    "Drafting",
    "Engine",
    "Generation",
    "GenerationCancelled",
    "GenerationOptions",
    "LoadOptions",
    "Mode",
    "ModelOutputError",
    "PathStep",
    "Token",
    "ToolCall",
    "TopLogprob",
    "collect",
    "load",
]
