"""From logits to tokens and text: sampling, grammars, speculative decoding, stop texts."""

__all__: list[str] = []
