"""What this machine can do."""

import ctypes
import sys
from pathlib import Path

__all__ = ["cpu_multiplies_bf16", "give_back_heap"]


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def give_back_heap() -> None:
    """Give what is free on the heap back to the system, where its C library can: glibc keeps it for later."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
