"""Models that read pictures or sounds too: the text model in them; start at `text_models.py`."""

__all__: list[str] = []
