"""The routes: OpenAI's, and those of the page, the map, health and metrics."""

__all__: list[str] = []
