"""What executes a model: the protocol, the native engine (C++, CPU) and the torch engine (any device)."""

__all__: list[str] = []
