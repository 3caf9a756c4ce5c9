#!/usr/bin/env python3
"""Writes src/format/testdata/dequant.safetensors: random blocks of every storage type that is read, and what the
`gguf` package makes of them. Needs gguf 0.19.0 and numpy; run again only if a type is added.

    tools/make_dequant_goldens.py src/format/testdata/dequant.safetensors
"""

import json
import struct
import sys

import gguf
import numpy as np

TYPES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K".split()
SCALES = {  # byte offsets of the 16-bit floats in a block
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
    "Q6_K": [208],
}
SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF]  # zeros, subnormals, the largest


def main():
    random = np.random.default_rng(1)
    arrays = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = 512 // block if block < 256 else 3
        raw = random.integers(0, 256, (blocks, size), dtype=np.uint8)
        if name in ("F32", "BF16"):  # any finite value
            raw[:, size - 1] &= 0xBF
        for offset in SCALES.get(name, []):
            scale = (random.normal(0, 0.05, blocks)).astype(np.float16).view(np.uint16)
            scale[: len(SPECIAL)] = SPECIAL[:blocks] if offset == 0 or name == "Q6_K" else SPECIAL[:blocks][::-1]
            raw[:, offset : offset + 2] = scale.astype("<u2").view(np.uint8).reshape(blocks, 2)
        data = raw.reshape(1, -1)
        values = gguf.dequantize(data.view(np.float32) if name == "F32" else data, kind)
        if name == "F16":
            values = data.view(np.float16).astype(np.float32)
        values = np.ascontiguousarray(values, dtype=np.float32).ravel()
        assert values.size == blocks * block and np.isfinite(values).all(), name
        arrays[f"{name}.stored"] = ("U8", raw.ravel())
        arrays[f"{name}.values"] = ("F32", values)

    header, at = {}, 0
    for name, (dtype, array) in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(sys.argv[1], "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, array in arrays.values():
            f.write(array.tobytes())


if __name__ == "__main__":
    main()
