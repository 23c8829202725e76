"""Replicas of engines on Ray, and who of them gets a request.

`replicas.py` is the front's side: it takes requests as a `Worker` does. `replica.py` is an engine in a process of its
own, with a `Worker` of its own. Between them cross the plain values of `messages.py`.
"""

__all__: list[str] = []
