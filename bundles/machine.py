"""What this machine can do."""

from pathlib import Path

__all__ = ["cpu_multiplies_bf16"]


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
