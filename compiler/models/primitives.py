"""How many compiled products oneDNN keeps, which multiplies for torch on CPUs."""

import os

__all__ = ["PRIMITIVES_VARIABLE", "keep_few_primitives"]

PRIMITIVES_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def keep_few_primitives() -> None:
    """Have oneDNN keep 64 compiled products instead of 1024.

    Healing needs hundreds of new ones a step, for each layer is of another width and each step's text of another
    length; gigabytes of memory went into those that would never be used again. Without effect once torch has
    multiplied, and where the user has set the variable.
    """
    os.environ.setdefault(PRIMITIVES_VARIABLE, "64")
