"""A real small model of the Llama architecture, stories260K, in transformers' classes; its text; perplexity."""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import shared

LENGTH = 256
_MATRICES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}


class Logits(nn.Module):
    """A library's language model that returns one tensor and keeps no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def stories260k(*, tied: bool = False) -> Logits:
    """The pretrained model; its output head is the embedding's tensor in the file, here a copy unless ``tied``."""
    raw = (shared("lm_stories260k") / "stories260K.bin").read_bytes()
    width, hidden, layers, heads, kv_heads, words, length = struct.unpack("7i", raw[:28])
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_weights(raw[28:], config), strict=not tied)
    return Logits(model.eval())


def _weights(raw: bytes, config: Any) -> dict[str, Tensor]:
    """The file's matrices by transformers' names; it turns neighbouring channels of a head, transformers its halves."""
    numbers, at = torch.from_numpy(np.frombuffer(raw, "<f4").copy()), 0
    width, hidden, words = config.hidden_size, config.intermediate_size, config.vocab_size
    size = width // config.num_attention_heads
    narrow = size * config.num_key_value_heads

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += math.prod(shape)
        return numbers[at - math.prod(shape) : at].view(shape).clone()

    found = {"model.embed_tokens.weight": take(words, width)}
    shapes = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "mlp.up_proj": (hidden, width),
    }
    for name, shape in shapes.items():
        for i in range(config.num_hidden_layers):
            value = take(*shape)
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                value = value.view(-1, size // 2, 2, width).transpose(1, 2).reshape(shape)
            found[f"model.layers.{i}.{name}.weight"] = value
    found["model.norm.weight"] = take(width)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    return found


def tokens(limit: int | None = None) -> Tensor:
    """The development text as token ids, encoded story by story as the model's own tokenizer does."""
    pieces, scores = _vocabulary()
    text = (shared("lm_stories260k") / "tinystories_dev.txt").read_text(encoding="utf8")[:limit]
    ids: list[int] = []
    for story in text.split("<|endoftext|>"):
        if story.strip():
            ids += [1, *_encoded(story.strip(), pieces, scores)]
    return torch.tensor(ids)


def _vocabulary() -> tuple[dict[bytes, int], list[float]]:
    raw, at = (shared("lm_stories260k") / "tok512.bin").read_bytes(), 4
    pieces: dict[bytes, int] = {}
    scores = []
    while at < len(raw):
        score, length = struct.unpack("fi", raw[at : at + 8])
        pieces.setdefault(raw[at + 8 : at + 8 + length], len(scores))
        scores.append(score)
        at += 8 + length
    return pieces, scores


def _encoded(text: str, pieces: dict[bytes, int], scores: list[float]) -> list[int]:
    """Byte-pair merges in the order of their scores, word by word: no piece has a space inside."""
    names = {i: piece for piece, i in pieces.items()}
    ids: list[int] = []
    for word in text.split(" "):
        part = [pieces.get(c.encode(), -1) for c in f" {word}"]
        part = [
            i for c, i in zip(f" {word}", part, strict=True) for i in ([i] if i >= 0 else [b + 3 for b in c.encode()])
        ]
        while len(part) > 1:
            merged = [pieces.get(names.get(a, b"") + names.get(b, b""), -1) for a, b in pairwise(part)]
            best = max(range(len(merged)), key=lambda i: (merged[i] >= 0, scores[merged[i]], -i))
            if merged[best] < 0:
                break
            part[best : best + 2] = [merged[best]]
        ids += part
    return ids


def rows(ids: Tensor, count: int, skip: int = 0) -> list[Tensor]:
    """``count`` sequences ``[1, 256]`` of a text, from sequence ``skip`` on."""
    cut = ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)
    return list(cut[skip : skip + count])


@torch.no_grad()
def perplexity(model: nn.Module, sequences: list[Tensor]) -> float:
    """``exp`` of the mean cross-entropy of each token after the first of a sequence."""
    total = 0.0
    for batch in torch.cat(sequences).split(16):
        logits = model(batch)[:, :-1]
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(sequences) * (LENGTH - 1)))
