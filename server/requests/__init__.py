"""What clients send: every field checked, and what is wrong said in the client's own terms."""

__all__: list[str] = []
