"""Small models of transformers with random weights, equal at every call."""

from typing import Any

import torch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def _made(name: str, layers: int, options: dict[str, Any]) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES | {"num_hidden_layers": layers} | options)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).double().eval()


def llama(layers: int = 2, **options: Any) -> Any:
    return _made("Llama", layers, options)


def qwen3(layers: int = 2, **options: Any) -> Any:
    return _made("Qwen3", layers, options)
