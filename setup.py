"""Build of the native engine; everything else is in pyproject.toml."""

import os
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# GCC 12 warns of its own AVX-512 headers, and of vectors as arguments of functions that are all inlined.
WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
# COREINFER_CXXFLAGS adds options, such as those of the sanitizers (tools/sanitize.sh).
EXTRA = os.environ.get("COREINFER_CXXFLAGS", "").split()

setup(
    ext_modules=[
        Pybind11Extension(
            "coreinfer.runtime.engines.native._native",
            sorted(glob("runtime/engines/native/csrc/*.cpp")),
            depends=sorted(glob("runtime/engines/native/csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-g0", "-pthread", *WARNINGS, *EXTRA],
            extra_link_args=["-pthread", *EXTRA],
        )
    ]
)
