"""What a served bundle's files say of it beyond its manifest."""

import hashlib

from coreinfer.bundles import Bundle
from coreinfer.bundles.layout import LAYOUT

__all__ = ["created_seconds", "fingerprint"]


def created_seconds(bundle: Bundle) -> int:
    """When a bundle's manifest was written, since 1970."""
    return int((bundle.path / LAYOUT.manifest).stat().st_mtime)


def fingerprint(bundle: Bundle) -> str:
    """What tells a bundle from all others."""
    return f"coreinfer-{hashlib.sha256((bundle.path / LAYOUT.manifest).read_bytes()).hexdigest()[:12]}"
