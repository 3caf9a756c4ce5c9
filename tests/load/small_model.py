"""Writes a small random Llama with a tokenizer of bytes and a ChatML template: a model that serves as fast as anything can,
for tests of what stands around it."""

import json
import pathlib
import random
import struct

LAYERS, C, HEADS, KV_HEADS, D, MLP, CONTEXT = 8, 64, 4, 2, 16, 128, 16384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_characters():
    """What byte-level tokenizers write for each byte: itself where it is printable, else a character from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokenizer():
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *byte_characters(), "th"])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["t h"]},
    }


def tensors(vocabulary):
    yield "model.embed_tokens.weight", (vocabulary, C)
    yield "model.norm.weight", (C,)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (C,)
        yield f"{at}.post_attention_layernorm.weight", (C,)
        yield f"{at}.self_attn.q_proj.weight", (HEADS * D, C)
        yield f"{at}.self_attn.k_proj.weight", (KV_HEADS * D, C)
        yield f"{at}.self_attn.v_proj.weight", (KV_HEADS * D, C)
        yield f"{at}.self_attn.o_proj.weight", (C, HEADS * D)
        yield f"{at}.mlp.gate_proj.weight", (MLP, C)
        yield f"{at}.mlp.up_proj.weight", (MLP, C)
        yield f"{at}.mlp.down_proj.weight", (C, MLP)


def write_safetensors(path, vocabulary, seed):
    rng = random.Random(seed)
    header, data = {}, bytearray()
    for name, shape in tensors(vocabulary):
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        values = [1.0] * count if len(shape) == 1 else [rng.gauss(0, 0.08) for _ in range(count)]
        begin = len(data)
        data += struct.pack(f"<{count}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write(folder, seed=1):
    """The model's files in `folder`, which is made."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    vocabulary = len(made["model"]["vocab"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": C,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": D,
        "max_position_embeddings": CONTEXT,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    write_safetensors(folder / "model.safetensors", vocabulary, seed)
