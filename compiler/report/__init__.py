"""The description of a bundle: manifest and report.html."""

__all__: list[str] = []
