"""Build of the C++ modules; everything else is in pyproject.toml."""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# GCC 12 warns of its own AVX-512 headers, and of vectors as arguments of functions that are all inlined.
WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
# COREINFER_CXXFLAGS adds options, such as those of the sanitizers (tools/sanitize.sh).
EXTRA = os.environ.get("COREINFER_CXXFLAGS", "").split()
# The engine computes, and weights are rounded to, the same bits on every CPU: no product may be fused with a sum.
UNFUSED = ["-ffp-contract=off"]

SHARED = "bundles/shared/csrc"


# The C API is part of the engine's module, which shows none of its names.
ENGINE = ["runtime/engines/native/csrc", "runtime/engines/native/assembly", "runtime/engines/native/capi"]
HIDDEN = ["-DCOREINFER_STATIC"]


def extension(module: str, folders: list[str], options: list[str]) -> Pybind11Extension:
    """Build a module from the C++ files of some folders."""
    headers = [*folders, SHARED, "compiler/csrc"]
    return Pybind11Extension(
        module,
        sorted(path for folder in folders for path in glob(f"{folder}/*.cpp")),
        depends=sorted(path for folder in headers for path in glob(f"{folder}/*.h")),
        include_dirs=[*folders, SHARED],
        cxx_std=17,
        extra_compile_args=["-O3", "-g0", "-pthread", *options, *WARNINGS, *EXTRA],
        extra_link_args=["-pthread", *EXTRA],
    )


# A compiler for each core, or as many as COREINFER_BUILD_JOBS says.
ParallelCompile("COREINFER_BUILD_JOBS").install()
setup(
    ext_modules=[
        extension("coreinfer.runtime.engines.native._native", ENGINE, [*UNFUSED, *HIDDEN]),
        extension("coreinfer.compiler.quantize._kernels", ["compiler/quantize/csrc"], UNFUSED),
        extension("coreinfer.compiler.prune._products", ["compiler/prune/csrc"], []),
    ]
)
