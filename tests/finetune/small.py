"""A Llama of one block with masks, and rows to train it on."""

from __future__ import annotations

import torch

from gossamer.finetune.tokens import TokenRows


def llama(seed: int = 0, layers: int = 1):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def masks_of(model, density: float = 0.4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in model.named_parameters()
        if "proj" in name
    }


def rows(count: int = 40, length: int = 12, labelled: bool = True) -> TokenRows:
    """Counting modulo 32 in steps of one to three: learnable. Unlabelled tokens differ in number from row to row."""
    generator = torch.Generator().manual_seed(6)
    start, stride = (torch.randint(1, high, (count, 1), generator=generator) for high in (32, 4))
    ids = (start + stride * torch.arange(length)) % 32
    labels = ids.clone()
    if not labelled:
        for row in range(count):
            labels[row, : 1 + row % (length - 2)] = -100
    return TokenRows(ids, labels)


def zeros_of(model, masks) -> int:
    """Exact +0.0 among the pruned entries, counted independently of the guard."""
    total = 0
    for name, mask in masks.items():
        pruned = model.get_parameter(name).detach()[~mask]
        assert not torch.signbit(pruned).any()
        total += int((pruned == 0).sum())
    return total
