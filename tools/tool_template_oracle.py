#!/usr/bin/env python3
"""Writes tests/data/chat/tools/golden.json: what transformers' apply_chat_template renders for conversations with tools
with each template of that folder.

Needs transformers, tokenizers and jinja2; the tests need none of them.

    python3 tools/tool_template_oracle.py
"""

import copy
import json
import pathlib

import transformers
from chat_template_oracle import render, tokenizer_with

DATA = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "chat" / "tools"

# Template file -> BOS, EOS, whether arguments are given as text and an absent content as None.
TEMPLATES = {
    "hermes": ("", "<|im_end|>", False, False),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", False, False),
    "mistral": ("<s>", "</s>", False, False),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", True, True),
    "python-text": ("", "<|im_end|>", False, False),
    "macros": ("", "<|im_end|>", False, False),
}


def tool(name, description, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = tool("get_weather", "The weather \"now\" – here's more:\n<b>&</b>", city={"type": "string", "enum": ["Ósló", "x'y"]},
               days={"type": "integer", "default": 3, "minimum": -1})
OTHER = tool("f", "It's", a={"type": ["number", "null"], "default": None}, b={"type": "boolean", "default": True},
             c={"type": "array", "items": {}, "default": []})
WEATHER_CALL = {"id": "call00001", "name": "get_weather", "arguments": '{"city": "Ósló \\"x\\" <|im_end|>", "days": 2}'}
OTHER_CALL = {"id": "call00002", "name": "f", "arguments": '{"a": 1.5, "b": false, "c": [null, {"d": 12345678901}]}'}


def said(role, content):
    return {"role": role, "content": content}


def called(*calls, content=""):
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(call, content):
    return {"role": "tool", "content": content, "tool_call_id": call["id"], "name": call["name"]}


ROUND = [said("user", "Weather in Ósló?"), called(WEATHER_CALL), result(WEATHER_CALL, '{"sun": true}\n')]
CONVERSATIONS = [
    {"tools": [WEATHER], "messages": [said("user", "Weather?")]},
    {"tools": [WEATHER, OTHER], "messages": [said("system", " Be brief.\n"), said("user", "Weather?"), said("assistant", "Where?"),
                                             said("user", "Ósló")]},
    {"tools": [WEATHER], "messages": ROUND},
    {"tools": [WEATHER, OTHER], "messages": [*ROUND, said("assistant", "Sun."), said("user", "And?")]},
    {"tools": [WEATHER, OTHER], "messages": [said("user", "Both"), called(WEATHER_CALL, OTHER_CALL), result(WEATHER_CALL, "1"),
                                             result(OTHER_CALL, "2")]},
    {"tools": [], "messages": ROUND},
]


def for_template(messages, as_text, null_content):
    """The messages as the template takes them."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for i, call in enumerate(message.get("tool_calls", ())):
            arguments = call["arguments"] if as_text else json.loads(call["arguments"])
            function = {"name": call["name"], "arguments": arguments}
            message["tool_calls"][i : i + 1] = [{"id": call["id"], "type": "function", "function": function}]
            if null_content:
                message["content"] = None
    return messages


def main():
    golden = {"made_by": f"tools/tool_template_oracle.py, transformers {transformers.__version__}",
              "conversations": CONVERSATIONS, "templates": {}}
    for name, (bos, eos, as_text, null_content) in TEMPLATES.items():
        source = (DATA / f"{name}.jinja").read_text()
        tokenizer = tokenizer_with(bos, eos)
        renders = []
        for conversation in CONVERSATIONS:
            messages = [dict(m, tool_calls=list(m["tool_calls"])) if "tool_calls" in m else m for m in conversation["messages"]]
            messages = for_template(messages, as_text, null_content)
            text = render(tokenizer, source, messages, True, tools=conversation["tools"] or None)
            renders.append(text if isinstance(text, dict) else {"text": text})
        golden["templates"][name] = {"bos": bos, "eos": eos, "renders": renders}
    path = DATA / "golden.json"
    path.write_text(json.dumps(golden, ensure_ascii=True, indent=0) + "\n")
    print(f"{path.name}: {len(CONVERSATIONS)} conversations, {len(TEMPLATES)} templates, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
