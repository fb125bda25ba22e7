# SPDX-License-Identifier: Apache-2.0
"""A text encoder without any package, for tests: hashed words through a fixed random matrix; and a tiny CLIP made on the spot."""

import hashlib

import torch

from torch_utils import misc
from training.data import text

DIM, LENGTH = 12, 6


class Words:
    """One vector per word, a fixed function of the word; pooled: their sum with that of the beginning of a text."""

    pooling, length = 'sum', LENGTH

    def __init__(self, place, device):
        self.place, self.sha256, self.calls = place, hashlib.sha256(f'words {place}'.encode()).hexdigest(), []

    def word(self, word):
        return torch.randn(DIM, generator=misc.generator('words', self.place, word))

    def __call__(self, captions, tokens):
        self.calls.append(len(captions))
        rows = torch.stack([torch.stack([self.word(word) for word in ['^', *caption.split(), *['_'] * LENGTH][:tokens or LENGTH]])
                            for caption in captions])
        return rows if tokens else rows.sum(1)


def register(monkeypatch):
    """Adds it to the registry, for one test."""
    monkeypatch.setitem(text.TEXT_ENCODERS, 'words', Words)


WORDS = ['<|startoftext|>', '<|endoftext|>', '<unk>', 'a', 'red', 'blue', 'square', 'big', 'small']


def make_clip(folder, kind='CLIPTextModelWithProjection', seed=0):
    """Writes a CLIP text model with its tokenizer; needs transformers. Returns the folder."""
    import tokenizers
    import transformers
    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token='<unk>'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f'{WORDS[0]} $A {WORDS[1]}', special_tokens=[(WORDS[0], 0), (WORDS[1], 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=WORDS[0], eos_token=WORDS[1], unk_token='<unk>',
                                         pad_token=WORDS[1], model_max_length=8).save_pretrained(folder)
    config = transformers.CLIPTextConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, projection_dim=DIM,
                                         num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8, bos_token_id=0,
                                         eos_token_id=1, pad_token_id=1)
    with misc.seeded('clip', seed):
        getattr(transformers, kind)(config).save_pretrained(folder)
    return str(folder)
