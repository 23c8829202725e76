"""The native engine: C++ kernels that decode from mapped weights on the CPU."""
