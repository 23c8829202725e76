"""The runtime's commands: coreinfer-run, with its chat, and coreinfer-bench."""

__all__: list[str] = []
