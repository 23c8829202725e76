"""What all packages share and is not part of a bundle: commands, checks of options, the machine, text files."""

__all__: list[str] = []
