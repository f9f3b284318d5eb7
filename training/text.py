"""The text side: a byte-level BPE tokenizer over the captions and a small UMT5 encoder."""

import random

import torch
import torch.nn.functional as F
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .captions import COLOURS, MOTIONS, NAMES, PATTERNS, Scene, caption
from .data import random_scene

TOKENS = 32
"""Slots kept for a caption in training; the rest of a padded prompt counts by its number."""

PAD, EOS = 0, 1


def build_tokenizer(vocabulary: int = 768, captions: int = 20000) -> PreTrainedTokenizerFast:
    """Lower-cased byte-level BPE: any text has tokens, every caption word is one token."""
    rng = random.Random(0)
    corpus = [caption(random_scene(rng, i % 2 == 1), rng) for i in range(captions)]
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return wrap_tokenizer(core)


def wrap_tokenizer(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def t5_numbers(config: dict, vocabulary: int) -> dict:
    """What both kinds of T5 encoders are built from."""
    return {
        "vocab_size": vocabulary,
        "d_model": config["dim"],
        "d_kv": 64,
        "d_ff": config["ffn_dim"],
        "num_layers": config["layers"],
        "num_heads": config["dim"] // 64,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 32,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
    }


def build_text_encoder(config: dict, vocabulary: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**t5_numbers(config, vocabulary), tie_word_embeddings=False))


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [B, TOKENS]; at least one slot stays free for padding."""
    rows = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True)
    ids, mask = torch.tensor(rows["input_ids"]), torch.tensor(rows["attention_mask"])
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


@torch.no_grad()
def encode_captions(model: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, TOKENS, D] in bf16 with zeros after each end, and lengths [B]."""
    outputs = []
    for part, part_mask in zip(ids.split(8192), mask.split(8192), strict=True):
        hidden = model(part, part_mask).last_hidden_state
        outputs.append((hidden * part_mask[..., None]).to(torch.bfloat16))
    return torch.cat(outputs), mask.sum(1)


class TextHeads(nn.Module):
    """Linear read-outs of what a caption says, from the mean over its tokens."""

    def __init__(self, dim: int):
        super().__init__()
        counts = {
            "object": len(NAMES),
            "colour": len(COLOURS),
            "pattern": len(PATTERNS),
            "motion": len(MOTIONS) + 1,
            "column": 4,
            "row": 4,
        }
        self.heads = nn.ModuleDict({name: nn.Linear(dim, n) for name, n in counts.items()})

    def forward(self, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
        weight = mask[..., None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        return {name: head(pooled) for name, head in self.heads.items()}


def caption_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """What each caption says as class indices; the last class of a kind is "not said"."""
    n = len(MOTIONS)
    return {
        "object": torch.tensor([s.obj for s in scenes]),
        "colour": torch.tensor([s.colour for s in scenes]),
        "pattern": torch.tensor([s.pattern for s in scenes]),
        "motion": torch.tensor([n if s.motion is None else s.motion for s in scenes]),
        "column": torch.tensor([3 if s.place is None else s.place[0] for s in scenes]),
        "row": torch.tensor([3 if s.place is None else s.place[1] for s in scenes]),
    }


def text_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    return torch.stack([F.cross_entropy(logits[k], labels[k]) for k in logits]).sum()
