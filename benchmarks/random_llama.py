"""A random Llama folder of any size, written tensor by tensor: for memory, time and file-size measurements.

    python benchmarks/random_llama.py OUT                       # TinyLlama's shape: 1.1 B parameters, bfloat16, 2.2 GB
    python benchmarks/random_llama.py OUT --layers 32           # the same width, deeper
    python benchmarks/random_llama.py OUT --hidden 256 --intermediate 688 --heads 8 --kv-heads 4 --vocab 4096 --layers 4

The folder loads with transformers like any other. Its tokenizer is a byte-level BPE trained on the documentation texts
of the Python standard library; `calibration.txt` and `heldout.txt` hold the same texts. Weights are normal with
standard deviation 0.02, seeded per tensor name, so that block k is the same at every depth. A few hundred MB of memory
suffice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gossamer.compress.demo_text import collect_documents, split_documents

STANDARD_DEVIATION = 0.02
CHUNK = 1 << 22  # elements drawn and written at a time
LARGEST_TOKENIZER = 8192
TRAINING_CHARACTERS = 2_000_000
_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are TinyLlama 1.1B's."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000
    max_positions: int = 2048

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads must divide the width {self.hidden}, and {self.kv_heads} KV heads the heads"
            )

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in file order."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config(self, dtype: torch.dtype) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": self.max_positions,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "initializer_range": STANDARD_DEVIATION,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": str(dtype).removeprefix("torch."),
        }


def build(
    folder: str | Path, shape: Shape | None = None, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write the model, its tokenizer and two texts to `folder`; the folder."""
    shape = shape or Shape()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", shape, dtype, seed)
    _write_json(folder / "config.json", shape.config(dtype))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    training, held_out = split_documents(collect_documents())
    (folder / "calibration.txt").write_text(training, encoding="utf-8")
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8")
    write_tokenizer(folder, training[:TRAINING_CHARACTERS], shape)
    return folder


def write_weights(path: Path, shape: Shape, dtype: torch.dtype, seed: int) -> None:
    """One safetensors file, never holding more than `CHUNK` elements."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in shape.tensors():
        end = offset + math.prod(size) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, size in shape.tensors():
            for chunk in _values(name, size, dtype, seed):
                file.write(chunk.view(torch.uint8).numpy().data)
    os.replace(temporary, path)


def write_tokenizer(folder: Path, text: str, shape: Shape) -> None:
    """A byte-level BPE of at most `LARGEST_TOKENIZER` tokens (further rows of the embedding are never looked up)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(shape.vocab, LARGEST_TOKENIZER),
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    if tokenizer.get_vocab_size() > shape.vocab:
        raise ValueError(f"a vocabulary of {shape.vocab} is too small: bytes alone need {tokenizer.get_vocab_size()}")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _values(name: str, size: tuple[int, ...], dtype: torch.dtype, seed: int) -> Iterator[torch.Tensor]:
    """The tensor's elements in order: ones for norms, else normal numbers seeded by the tensor's name."""
    count = math.prod(size)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        if len(size) == 1:
            yield torch.ones(length, dtype=dtype)
        else:
            yield torch.randn(length, generator=generator).mul_(STANDARD_DEVIATION).to(dtype)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = Shape(**{field.name: getattr(options, field.name) for field in fields(Shape)})
    started = time.monotonic()
    build(options.folder, shape, dtype=getattr(torch, options.dtype), seed=options.seed)
    size = sum(file.stat().st_size for file in options.folder.iterdir())
    seconds = time.monotonic() - started
    print(f"{options.folder}: {shape.parameters / 1e9:.3f} B parameters, {size / 1e9:.2f} GB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
