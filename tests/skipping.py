"""Engines that leave inputs out, of models whose columns are shorter than what is worth it."""

from pathlib import Path
from typing import Literal

from coreinfer import runtime
from coreinfer.bundles import Bundle, open_bundle
from coreinfer.runtime.engines.native.decoder import NativeDecoder


def masking_decoder(bundle: Bundle, *, isa: str = "auto", columns: bool = False) -> NativeDecoder:
    """A decoder that counts as 0 what is not wanted; with `columns` it does not read it."""
    decoder = NativeDecoder(bundle, threads=2, isa=isa, input_skipping="masked")
    assert decoder.token_shares_pay
    if columns:
        lay_out_all(decoder, bundle)
    return decoder


def lay_out_all(decoder: NativeDecoder, bundle: Bundle) -> None:
    record = bundle.manifest.token_shares
    assert record is not None
    decoder._model.lay_out_columns([True] * 4, record.halves, 0)


def skipping_engine(folder: Path, skipping: Literal["on", "masked", "off"]) -> runtime.Engine:
    engine = runtime.load(folder, input_skipping=skipping, threads=2)
    if skipping == "on":
        assert isinstance(engine.decoder, NativeDecoder)
        assert engine.decoder.token_shares_pay
        # Else nothing lies by columns.
        lay_out_all(engine.decoder, open_bundle(folder))
    return engine
