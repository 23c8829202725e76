"""The same of mixtures of experts: which experts stay, or which neurons of each, and how these are repaired."""

__all__: list[str] = []
