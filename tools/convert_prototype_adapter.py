#!/usr/bin/env python3
"""Converts an adapter of the first PyTorch prototype to the project's format (docs/adapter_format.md).

    tools/convert_prototype_adapter.py PROTOTYPE.safetensors FINGERPRINT OUT.safetensors

The tensors have the same names and shapes in both; the metadata is rewritten and the tensors are put in the order
that the project's own writer uses. FINGERPRINT is the base model's, as `dsla inspect MODEL` prints it. Needs numpy.
"""

import argparse
import json
import os
import struct
import sys

import numpy as np

SUFFIXES = ["q_a", "q_b", "o_a", "o_b", "phi_q", "phi_k", "gate_weight", "gate_bias", "mix", "claim", "claim_bias"]
TOP_LEVEL = 22  # the rung up to which the prototype still copies from its context


def read_safetensors(path):
    """Returns (metadata, {name: (shape, bf16 bits as uint16)})."""
    with open(path, "rb") as f:
        blob = f.read()
    (size,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            sys.exit(f"{path}: tensor {name} is {entry['dtype']}, expected BF16")
        begin, end = entry["data_offsets"]
        bits = np.frombuffer(blob[8 + size + begin : 8 + size + end], dtype="<u2")
        if bits.size != int(np.prod(entry["shape"])):
            sys.exit(f"{path}: tensor {name} has {bits.size} elements for shape {entry['shape']}")
        if ((bits & 0x7F80) == 0x7F80).any():
            sys.exit(f"{path}: tensor {name} holds NaN or Inf")
        tensors[name] = (entry["shape"], bits)
    return metadata, tensors


def write_safetensors(path, metadata, tensors):
    header, at = {"__metadata__": metadata}, 0
    for name, (shape, bits) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + bits.nbytes]}
        at += bits.nbytes
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, bits in tensors.values():
            f.write(bits.tobytes())
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prototype")
    parser.add_argument("fingerprint")
    parser.add_argument("out")
    args = parser.parse_args()
    if len(args.fingerprint) != 64:
        sys.exit(f"fingerprint '{args.fingerprint}' is not 64 hex digits")

    old, tensors = read_safetensors(args.prototype)
    expected = {"format": "dsla-adapter-prototype", "features": "softmax-pair", "input_scale": "1-exp(a)"}
    for key, value in expected.items():
        if old.get(key) != value:
            sys.exit(f"{args.prototype}: {key} is '{old.get(key)}', expected '{value}'")
    ladder = json.loads(old["ladder"])
    ordered = {}
    for layer in range(len(ladder)):
        for suffix in SUFFIXES:
            name = f"layers.{layer}.{suffix}"
            if name not in tensors:
                sys.exit(f"{args.prototype}: no tensor {name}")
            ordered[name] = tensors.pop(name)
    if tensors:
        sys.exit(f"{args.prototype}: unexpected tensor {sorted(tensors)[0]}")
    metadata = {
        "format": "dsla-adapter",
        "version": "1",
        "base_fingerprint": args.fingerprint,
        "base_name": old["base"],
        "ladder": json.dumps(ladder, separators=(",", ":")),
        "top_level": str(TOP_LEVEL),
        "window": old["window"],
        "sinks": old["sinks"],
        "states": old["states"],
        "features": str(ordered["layers.0.gate_bias"][0][-1]),
        "rank": old["rank"],
        "gate_floor": old["gate_floor"],
        "gate_divisor": old["gate_divisor"],
        "feature_map": old["features"],
    }
    write_safetensors(args.out, metadata, ordered)
    print(f"{args.out}: {os.path.getsize(args.out)} bytes, {len(ladder)} layers, {len(ordered)} tensors")


if __name__ == "__main__":
    main()
