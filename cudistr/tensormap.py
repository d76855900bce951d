"""Tensor maps: what the copy engine of sm_90 needs to know of an array, encoded by the CUDA driver on the host."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, NamedTuple

from cudistr.errors import CudaUnavailableError

__all__ = ["MAP_BYTES", "Layout", "encode"]

MAP_BYTES = 128
_MAP_ALIGNMENT = 128  # what the header of CUDA 13 asks for; the driver refuses less than 64
# Numbers of the driver's enumerations.
_DATA_TYPE = {"float16": 6, "bfloat16": 9}
_NO_INTERLEAVE = 0
_SWIZZLE = {32: 1, 64: 2, 128: 3}  # by bytes of a panel's row
_PROMOTE_TO_256_BYTES = 3  # of L2: a miss fetches that much
_FILL_WITH_ZEROS = 0
_LENGTHS, _STRIDES, _BOX = ctypes.c_uint64 * 4, ctypes.c_uint64 * 3, ctypes.c_uint32 * 4


class Layout(NamedTuple):
    """An array (batch, heads, seqlen, columns) of 16-bit numbers, and the box that one copy takes.

    Attributes
    ----------
    lengths : tuple of int
        Of all four axes.
    strides : tuple of int
        Of the first three axes, in elements; multiples of 8, which is 16 bytes, and not negative.
    rows, columns : int
        Of the box; a row has 32, 64 or 128 bytes.
    """

    dtype: str
    lengths: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    rows: int
    columns: int


@functools.cache
def _encoder() -> Any:
    """``cuTensorMapEncodeTiled`` of the driver.

    Raises
    ------
    CudaUnavailableError
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        function = ctypes.CDLL(name).cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise CudaUnavailableError(
            f"the CUDA driver ({name}) cannot describe arrays to the copy engine ({error}). Update it to one for "
            "CUDA 12 or newer, or set CUDISTR_KERNEL=portable."
        ) from error
    pointer = ctypes.c_void_p
    function.argtypes = [
        pointer, ctypes.c_int, ctypes.c_uint32, pointer, _LENGTHS, _STRIDES, _BOX, _BOX,
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function


@functools.lru_cache(maxsize=4096)
def encode(layout: Layout, pointer: int) -> bytes:
    """The map of an array at an address of the device.

    Raises
    ------
    CudaUnavailableError
        If the driver refuses it.
    """
    # An axis of length 1 is never stepped over; its stride has to be a legal one all the same.
    strides = [
        2 * s if n > 1 else 16 for s, n in zip(layout.strides[::-1], layout.lengths[2::-1], strict=True)
    ]
    buffer = ctypes.create_string_buffer(MAP_BYTES + _MAP_ALIGNMENT)
    offset = -ctypes.addressof(buffer) % _MAP_ALIGNMENT
    status = _encoder()(
        ctypes.addressof(buffer) + offset,
        _DATA_TYPE[layout.dtype],
        4,
        pointer,
        _LENGTHS(*layout.lengths[::-1]),
        _STRIDES(*strides),
        _BOX(layout.columns, layout.rows, 1, 1),
        _BOX(1, 1, 1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE[2 * layout.columns],
        _PROMOTE_TO_256_BYTES,
        _FILL_WITH_ZEROS,
    )
    if status:
        raise CudaUnavailableError(
            f"the CUDA driver refuses to describe an array to the copy engine (error {status}, {layout}, address "
            f"{pointer:#x}). Set CUDISTR_KERNEL=portable, and report this."
        )
    return buffer.raw[offset : offset + MAP_BYTES]
