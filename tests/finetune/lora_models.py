"""Small sparse models with plain LoRA on them, and what they say."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

IDS = torch.arange(12).view(2, 6)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def trained(model, config: LoraConfig):
    """Wrapped, with factors that do something."""
    wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()
