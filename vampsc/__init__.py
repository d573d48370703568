"""Autoencoders for single-cell RNA counts with flexible posteriors and flexible priors."""

__version__ = "0.1.0"

import contextlib
import importlib
import os
import sys

_MODELS = ("CountAutoencoder", "AE", "VAE", "IAF", "VAMP", "VAMPIAF", "MOG", "HVAMP", "load")
_ROOMS = (
    "genes",
    "counts",
    "likelihood",
    "networks",
    "posteriors",
    "flows",
    "priors",
    "assembly",
    "training",
    "intake",
    "inference",
    "groups",
    "saving",
    "models",
    "metrics",
    "figures",
    "files",
    "downloads",
    "readers",
    "organs",
    "study",
    "tables",
    "devices",
    "beyond",
    "uses",
    "cli",
)
__all__ = [*_MODELS, *_ROOMS]


@contextlib.contextmanager
def without_startup_log():
    """TensorFlow announces CPU features and missing GPUs on the error stream as it is imported,
    whatever its log level.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    keep = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep), os.close(nowhere)


def __getattr__(name):
    # Loaded on first use: `import vampsc` stays instant, and TensorFlow starts only when a model is
    # wanted.
    if name not in __all__:
        raise AttributeError(f"module 'vampsc' has no attribute {name!r}")
    with without_startup_log():
        if name in _ROOMS:
            return importlib.import_module(f"vampsc.{name}")
        return getattr(importlib.import_module("vampsc.models"), name)


def __dir__():
    return sorted(__all__)
