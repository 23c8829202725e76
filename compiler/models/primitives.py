"""What the libraries that multiply for torch on CPUs are told before they are loaded."""

import os

__all__ = ["PRIMITIVES_VARIABLE", "keep_few_primitives", "let_threads_sleep", "threads_sleep"]

PRIMITIVES_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_SPIN_VARIABLE, _WAIT_VARIABLE = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


def keep_few_primitives() -> None:
    """Have oneDNN keep 64 compiled products instead of 1024.

    Healing needs hundreds of new ones a step, for each layer is of another width and each step's text of another
    length; gigabytes of memory went into those that would never be used again. Without effect once torch has
    multiplied, and where the user has set the variable.
    """
    os.environ.setdefault(PRIMITIVES_VARIABLE, "64")


def let_threads_sleep() -> None:
    """Have OpenMP's threads sleep between torch's operations, where they would spin for milliseconds.

    Kernels of our own have threads of their own, which then wait for cores that do nothing. Without effect once torch
    is loaded; what the user has set stays.
    """
    if _WAIT_VARIABLE not in os.environ:
        os.environ.setdefault(_SPIN_VARIABLE, "0")


def threads_sleep() -> bool:
    """Whether they do, as far as the environment tells."""
    return os.environ.get(_SPIN_VARIABLE) == "0" or os.environ.get(_WAIT_VARIABLE, "").lower() == "passive"
