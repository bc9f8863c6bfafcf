"""Packing of codes below 8 bits into bytes: two codes of 4 bits to a byte.

    byte = low | high << 4    along the last axis, the first code in the low nibble

It is the order of the compressed-tensors and GGUF families of files; a code is in two's complement.
"""

import numpy as np


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte along the last axis, the low nibble first, padded by a zero.

    Example:
        >>> pack_int4(np.array([-7, -1, 0, 1, 2, 4, 7, -3, 5])).tobytes().hex(" ")
        'f9 10 42 d7 05'
    """
    wide = np.asarray(codes).astype(np.int8)
    if wide.shape[-1] % 2:
        wide = np.concatenate([wide, np.zeros((*wide.shape[:-1], 1), np.int8)], axis=-1)
    nibbles = wide.view(np.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `pack_int4`, as int8; `size` is that of the last axis.

    Example:
        >>> unpack_int4(np.array([0xF9, 0x05], np.uint8), 3).tolist()
        [-7, -1, 5]
    """
    both = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return (((both[..., :size] ^ 8).astype(np.int16)) - 8).astype(np.int8)
