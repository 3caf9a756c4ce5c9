#!/usr/bin/env python3
"""Makes the golden data that the C++ model is compared with, by running transformers in fp32.

Needs torch, transformers, gguf, tokenizers and numpy, which the tests themselves do not: what it writes is committed.
  tests/data/models/FAMILY/   a small random model of each family, as transformers saves it, and its logits
  tests/data/smollm2/         the final hidden states of SmolLM2-135M-Instruct over 2,048 tokens of the GPL; logits are
                              their product with the embedding, which the test forms itself (400 MB otherwise)
Usage: tools/make_goldens.py GGUF [TEXT]
"""
import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data"
TOKENS = 48

SMALL = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)


def rope(kind="default", theta=10000.0, **more):
    return dict(rope_type=kind, rope_theta=theta, **more)


FAMILIES = {
    "llama2": (transformers.LlamaConfig, dict(num_key_value_heads=4, rope_parameters=rope())),
    "llama-linear-rope": (transformers.LlamaConfig, dict(rope_parameters=rope("linear", factor=2.0))),
    "llama3": (transformers.LlamaConfig, dict(rope_parameters=rope(
        "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16))),
    "llama-attention-bias": (transformers.LlamaConfig, dict(attention_bias=True, rope_parameters=rope())),
    "smollm2": (transformers.LlamaConfig, dict(hidden_size=144, num_attention_heads=9, num_key_value_heads=3, head_dim=16,
                                               tie_word_embeddings=True, rope_parameters=rope(theta=100000.0))),
    "mistral": (transformers.MistralConfig, dict(sliding_window=8, rope_parameters=rope())),
    "qwen2": (transformers.Qwen2Config, dict(rope_parameters=rope(theta=1000000.0))),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=32, tie_word_embeddings=True, rope_parameters=rope(theta=1000000.0))),
}


def small_model(name, config_class, changes):
    torch.manual_seed(sum(map(ord, name)))
    config = config_class(**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # Wide enough that every part matters; norms near one; exact in bf16, which halves the files.
            random = torch.randn_like(weight)
            weight.copy_((1 + 0.2 * random if "norm" in key else 0.25 * random).bfloat16().float())
    folder = ROOT / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().bfloat16().contiguous() for k, v in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    config.architectures = [model.__class__.__name__]
    (folder / "config.json").write_text(config.to_json_string())
    ids = torch.randint(2, SMALL["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model(ids).logits[0]
    np.asarray(ids[0], dtype=np.int32).tofile(folder / "tokens.i32")
    logits.numpy().astype(np.float32).tofile(folder / "logits.f32")
    print(name, tuple(logits.shape), float(logits.std()))


def smollm2(gguf_path, text_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize
    tensors = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))
               for t in GGUFReader(gguf_path).tensors}
    config = transformers.LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                      num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                                      rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=rope(theta=100000.0))
    model = transformers.LlamaForCausalLM(config).float().eval()

    def halves(weight, heads):  # GGUF interleaves the two halves of each rotated head
        return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)

    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "model.norm.weight": tensors["output_norm.weight"]}
    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(30):
        for ours, theirs in names.items():
            state[f"model.layers.{layer}.{ours}.weight"] = tensors[f"blk.{layer}.{theirs}.weight"]
        state[f"model.layers.{layer}.self_attn.q_proj.weight"] = halves(tensors[f"blk.{layer}.attn_q.weight"], 9)
        state[f"model.layers.{layer}.self_attn.k_proj.weight"] = halves(tensors[f"blk.{layer}.attn_k.weight"], 3)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    ids = np.fromfile(ROOT / "smollm2" / "tokens.i32", dtype=np.int32) if text_path is None else encode(gguf_path, text_path)
    with torch.no_grad():
        hidden = model.model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[:-1]), torch.from_numpy(ids[1:].astype(np.int64)))
    folder = ROOT / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    ids.astype(np.int32).tofile(folder / "tokens.i32")
    hidden.numpy().astype(np.float32).tofile(folder / "hidden.f32")
    print("smollm2", tuple(hidden.shape), "loss", float(loss))


def encode(gguf_path, text_path):
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    fields = GGUFReader(gguf_path).fields
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return np.array(tokenizer.encode(open(text_path).read()).ids[:2048], dtype=np.int32)


def main():
    torch.set_num_threads(2)
    for name, (config_class, changes) in FAMILIES.items():
        small_model(name, config_class, changes)
    if len(sys.argv) > 1:
        smollm2(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)


if __name__ == "__main__":
    main()
