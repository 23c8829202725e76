"""What all packages share and no bundle holds: commands, checks of options, the machine, text files."""

__all__: list[str] = []
