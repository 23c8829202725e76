"""The validation text that choices between ridges are made on."""

from collections.abc import Sequence
from dataclasses import replace

from coreinfer.compiler.samples import VALIDATION_TOKENS
from coreinfer.compiler.text.corpus import Document

from .narrow import Assignment

__all__ = ["few_validated"]


def few_validated(
    documents: Sequence[Document], assignments: Sequence[Assignment]
) -> tuple[Sequence[Document], list[Assignment]]:
    """Leave evenly spread documents of the validation text, of about as many tokens as a choice of ridges needs.

    Returns:
        The documents, and the assignments of these.
    """
    num_tokens = sum(len(document.token_ids) for document in documents)
    step = max(1, num_tokens // VALIDATION_TOKENS)
    return documents[::step], [replace(item, validation=item.validation[::step]) for item in assignments]
