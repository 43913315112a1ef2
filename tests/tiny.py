"""A random Llama with its own tokenizer and two texts: everything a command needs, made in a second."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_SYLLABLES = ["ka", "to", "mi", "ren", "sol", "ux", "ba", "lin", "dor", "pe"]
LIMIT = 64  # positions of the model


def words(count: int, seed: int) -> str:
    """Sentences of made-up words: each word makes some followers more likely, no two seeds share a sentence."""
    draw = random.Random(seed)
    vocabulary = [a + b for a in _SYLLABLES for b in _SYLLABLES]
    found, place = [], 0
    for _ in range(count):
        place = (place * 7 + draw.randrange(9)) % len(vocabulary)
        found.append(vocabulary[place] + ("." if draw.random() < 0.1 else ""))
    return " ".join(found)


def save_tokenizer(folder: Path, vocabulary: int = 320) -> None:
    """Byte-level BPE, one BOS (id 0) at the start of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words(3000, 99)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def save_words(folder: Path, vocabulary: int) -> None:
    """A tokenizer of whole symbols w2 ... for models with a small vocabulary; anything else is w2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(symbols, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w2").save_pretrained(folder)


def save_llama(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Path:
    """A random Llama (3 blocks of width 32 unless `config` says otherwise) with tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LIMIT,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.15,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(values | config)))
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_texts(folder: Path) -> None:
    """calibration.txt and heldout.txt, without a sentence in common."""
    (folder / "calibration.txt").write_text(words(1500, 1))
    (folder / "heldout.txt").write_text(words(600, 2))


def tensors(folder: Path, pattern: str = "model*.safetensors") -> dict[str, torch.Tensor]:
    """All tensors of a folder's files, by the safetensors library alone."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        if ".sparse" in path.name and ".sparse" not in pattern:
            continue
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every tensor file below a folder, and of config.json and the indices."""
    files = [*folder.rglob("*.safetensors"), *folder.glob("*.index*.json"), folder / "config.json"]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())
