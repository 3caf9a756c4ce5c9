#!/usr/bin/env python3
"""Times what the dual-state operator is measured against, on the same card: PyTorch's softmax attention (cuDNN and
FlashAttention, whichever is faster), causal over a prompt, and, where flash-linear-attention is installed, its chunk_gla,
whose keys have the features of both states; a device copy and a large matrix product. Medians of CUDA events.

Usage: rivals.py   (needs PyTorch with CUDA)
"""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    from fla.ops.gla import chunk_gla
except ImportError:
    chunk_gla = None


# Cycles in which all that is timed is queued, as in a model, whose launches are ahead of the GPU.
QUEUED = 2_000_000


def median_ms(run, repeats=11):
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(QUEUED)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def attention(q, k, v, causal, grouped):
    best = None
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                ms = median_ms(
                    lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
                )
        except RuntimeError:
            continue
        if best is None or ms < best[0]:
            best = (ms, backend.name)
    return best


def gated_linear_attention(heads, tokens, features, dim):
    """Features and log gates are given; what a layer of DSLA makes of q and k before that is not in it."""
    q, k, g = (torch.rand(1, tokens, heads, features, device="cuda") for _ in range(3))
    q, k, g = q.bfloat16(), k.bfloat16(), -0.1 * g
    v = torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
    return median_ms(lambda: chunk_gla(q, k, v, g, scale=1.0, output_final_state=True))


def main():
    if not torch.cuda.is_available():
        print("rivals: no CUDA device here", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    print(f"copy {2 * x.numel() / median_ms(lambda: y.copy_(x)) / 1e6:.0f} GB/s read and written")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    print(f"matrix product of 8192: {2 * 8192**3 / median_ms(lambda: a @ b) / 1e9:.0f} TFLOP/s")
    for heads, kv_heads, dim in ((32, 32, 128), (32, 8, 128), (9, 3, 64)):
        for tokens in (2048, 3072, 4096, 8192, 65536):
            q, k, v = (
                torch.randn(1, h, tokens, dim, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)
            )
            ms, name = attention(q, k, v, True, heads != kv_heads)
            print(f"causal softmax H {heads} Hkv {kv_heads} D {dim} T {tokens}: {1000 * ms:.1f} us ({name})")
    if chunk_gla is None:
        print("chunk_gla: skipped, flash-linear-attention is not installed")
        return 0
    for heads, dim in ((32, 128), (9, 64)):
        for tokens in (2048, 8192, 65536):
            ms = gated_linear_attention(heads, tokens, 256, dim)
            print(f"chunk_gla H {heads} F 256 D {dim} T {tokens}: {1000 * ms:.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
