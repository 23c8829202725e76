"""What a compile will take, reckoned before anything is loaded."""

__all__: list[str] = []
