"""What narrowing costs, measured on the stored files, and the search for a size of a wanted quality."""

__all__: list[str] = []
