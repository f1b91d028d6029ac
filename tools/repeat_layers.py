#!/usr/bin/env python3
"""Makes a deep model of a coded one-layer model: every layer is a copy of the first. For measurements of models that would take long to make.

usage: tools/repeat_layers.py DIR LAYERS OUT

DIR is a directory that `tersor quantize` wrote. Only what a loader reads is written: config.json, model.safetensors and the tokenizer's files.
"""

import json
import pathlib
import shutil
import struct
import sys

LAYER = "model.layers.0."


def main():
    source, layers, target = pathlib.Path(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    assert config["num_hidden_layers"] == 1, "the source must have one layer"
    config["num_hidden_layers"] = layers
    (target / "config.json").write_text(json.dumps(config))
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    with open(source / "model.safetensors", "rb") as file:
        header_bytes = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(header_bytes))
        start = 8 + header_bytes
        metadata = header.pop("__metadata__")
        # Blobs come first and are multiples of 64 long; raw tensors follow, widest elements first: the order of the source is kept.
        entries, end = {}, 0
        order = sorted(header, key=lambda name: header[name]["data_offsets"][0])
        copies = []
        for name in order:
            names = [name.replace(LAYER, f"model.layers.{layer}.") for layer in range(layers)] if name.startswith(LAYER) else [name]
            first, last = header[name]["data_offsets"]
            for copy in names:
                entries[copy] = {**header[name], "data_offsets": [end, end + last - first]}
                metadata["xxh3:" + copy] = metadata["xxh3:" + name]
                copies.append((first, last - first))
                end += last - first
        text = json.dumps({"__metadata__": metadata, **entries}).encode()
        text += b" " * (-(8 + len(text)) % 64)
        with open(target / "model.safetensors", "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            last_read, data = None, b""
            for first, count in copies:
                if last_read != first:
                    file.seek(start + first)
                    data, last_read = file.read(count), first
                out.write(data)
    print(f"{target}: {layers} layers, {end / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
