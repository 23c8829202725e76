"""What a bundle says of itself: manifest and report.html."""

__all__: list[str] = []
