"""How much of a file is in memory."""

import ctypes
import mmap

from coreinfer.bundles.tensors import TensorFile

_PAGE_BYTES = mmap.PAGESIZE


def resident_bytes(file: TensorFile) -> int:
    """Bytes of a mapped file whose pages are in memory, by mincore(2): of all processes, in whole pages."""
    values = file.mapped_bytes
    num_pages = -(-len(values) // _PAGE_BYTES)
    there = (ctypes.c_ubyte * num_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(len(values)), there) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return _PAGE_BYTES * sum(page & 1 for page in there)
