"""The runtime's commands: coreinfer-run, with its chat, and coreinfer-bench."""
