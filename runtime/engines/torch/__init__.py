"""The torch engine: any device and every family, through transformers."""

__all__: list[str] = []
