"""The native engine: C++ kernels that decode from mapped weights on the CPU."""

__all__: list[str] = []
