# SPDX-License-Identifier: Apache-2.0
"""Captions -> labels: text encoders, the registry of their kinds, and embeddings that do not depend on what else is embedded.

An encoder is made as kind(place, device), with what follows "KIND:" in its reference, and called as (captions, tokens) -> float32
[n, dim], or [n, tokens, dim] where tokens is not None. Its attributes: pooling (text), sha256 (of everything its output depends on),
length (tokens that a caption is cut or padded to). Errors are UserErrors that begin with the place."""

import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dnnlib import UserError, hub, one_line, text_record
from dnnlib.files import file_digest

ROWS = 8  # captions per call of the encoder, always as many: the shape of a call does not depend on the number of captions
LENGTH = 128  # tokens of a caption, at most: encoders for long texts allow thousands, which would cost time only
# The files of a model that its output depends on; others in its folder are not read.
FILES = ('config.json', 'model.safetensors', 'model-*-of-*.safetensors', 'model.safetensors.index.json', 'tokenizer.json',
         'tokenizer_config.json', 'vocab.json', 'vocab.txt', 'merges.txt', 'special_tokens_map.json', 'added_tokens.json',
         'spiece.model', 'sentencepiece.bpe.model', 'tokenizer.model')


class Captions:
    """Turns captions into labels: float32 rows, equal for equal captions.

    encoder: as above. ref: its reference. tokens: None for one pooled vector, of norm 1; otherwise each caption becomes its first
    `tokens` tokens' vectors, as the encoder gives them, one after the other. Attributes: record (see text_record), empty: float32
    [label_dim], the label of the empty caption. Raises UserError."""

    def __init__(self, encoder: Callable, ref: str, tokens: int | None = None):
        if tokens is not None and not 1 <= tokens <= encoder.length:
            raise UserError(f'--tokens={tokens}: {ref} takes 1 to {encoder.length} tokens')
        self._encoder, self._ref, self._tokens = encoder, ref, tokens
        self.empty = self._call([''])[0]
        self.record = text_record.checked({
            'encoder': ref, 'sha256': encoder.sha256, 'pooling': encoder.pooling if tokens is None else 'tokens',
            'normalised': tokens is None, 'dim': len(self.empty) // (tokens or 1), 'length': tokens or encoder.length, 'tokens': tokens})

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """The labels of captions, float32 [n, label_dim]; of an empty one exactly `empty`."""
        found = np.concatenate([self._call(captions[first:first + ROWS]) for first in range(0, len(captions), ROWS)])
        found[[i for i, caption in enumerate(captions) if not caption]] = self.empty
        return found

    def _call(self, captions):
        """At most ROWS captions, among empty ones."""
        rows = self._encoder([*captions, *[''] * (ROWS - len(captions))], self._tokens)[:len(captions)].float()
        if self._tokens is None:
            rows = torch.nn.functional.normalize(rows.double(), dim=1).float()
        if not rows.isfinite().all():
            raise UserError(f'--text-encoder={self._ref}: gives values that are not finite')
        return rows.flatten(1).cpu().numpy()


def open_captions(ref: str, tokens: int | None = None, device: torch.device | str = 'cpu') -> Captions:
    """The Captions of an encoder's reference: KIND:PLACE with a kind of TEXT_ENCODERS, or the place alone, for "hf". Raises UserError."""
    kind, _, place = ref.partition(':')
    if kind not in TEXT_ENCODERS:
        kind, place = 'hf', ref
    return Captions(TEXT_ENCODERS[kind](place, torch.device(device)), ref, tokens)


class HuggingFaceEncoder:
    """A text model of the package transformers: a folder with config.json, model.safetensors and the tokenizer's files, or a name of the
    Hub, owner/name[@revision].

    CLIP's text models give the projected embedding (CLIPModel, CLIPTextModelWithProjection) or the pooled one (CLIPTextModel); all
    others, such as T5's encoder, the mean over the caption's tokens. CLIP's are called without a mask of the padding, as they were
    trained. Nothing in the folder is executed."""

    def __init__(self, place: str, device: torch.device):
        self._place = place
        try:
            import transformers
        except ImportError:
            raise UserError(f'--text-encoder={place}: needs the package transformers: pip install transformers') from None
        folder = place if os.path.isdir(place) else _downloaded(place)
        self.sha256 = _digest(folder)
        bar = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            kind, self.pooling = _kind(transformers, config)
            self._net, told = kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        except Exception as err:  # the package raises errors of many kinds for files that it cannot read
            raise UserError(f'--text-encoder={place}: cannot be read: {one_line(err)}') from None
        finally:
            if bar:
                transformers.utils.logging.enable_progress_bar()
        missing = sorted(name for name in told['missing_keys'] if not re.search(r'pooler\.|position_ids', name))
        if missing:
            raise UserError(f'--text-encoder={place}: its weights lack {missing[0]} of {kind.__name__} ({len(missing)} missing)')
        self._net = self._net.to(device, torch.float32).eval().requires_grad_(False)
        most = getattr(getattr(config, 'text_config', config), 'max_position_embeddings', None)
        self.length = int(min(limit for limit in (self._tokenizer.model_max_length, most, LENGTH) if limit))
        if self._tokenizer.pad_token is None:
            raise UserError(f'--text-encoder={place}: its tokenizer has no token for padding')

    @torch.no_grad()
    def __call__(self, captions: list[str], tokens: int | None) -> torch.Tensor:
        told = self._tokenizer(captions, padding='max_length', truncation=True, max_length=tokens or self.length, return_tensors='pt',
                               return_attention_mask=True)
        told = {key: told[key].to(self._net.device) for key in ('input_ids', 'attention_mask')}
        mask = told['attention_mask'] if self.pooling == 'mean' else None
        try:
            found = self._net(input_ids=told['input_ids'], **({} if mask is None else {'attention_mask': mask}))
        except (IndexError, RuntimeError, TypeError, ValueError) as err:
            raise UserError(f'--text-encoder={self._place}: {one_line(err, last=True)}') from None
        if tokens is not None:
            return found.last_hidden_state
        if self.pooling == 'mean':
            weights = mask[:, :, None].to(found.last_hidden_state.dtype)
            return (found.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1)
        return found.text_embeds if self.pooling == 'projected' else found.pooler_output


def _kind(transformers, config):
    """(class of transformers, pooling) for a configuration."""
    name = (getattr(config, 'architectures', None) or [''])[0]
    if name in ('CLIPModel', 'CLIPTextModelWithProjection'):
        return transformers.CLIPTextModelWithProjection, 'projected'
    if name == 'CLIPTextModel':
        return transformers.CLIPTextModel, 'pooled'
    return (transformers.AutoModelForTextEncoding if getattr(config, 'is_encoder_decoder', False) else transformers.AutoModel), 'mean'


def _downloaded(place):
    """The folder of a model of the Hub in its client's cache."""
    name = hub.NAME.fullmatch(place)
    if not name:
        raise UserError(f'--text-encoder={place}: no such folder; a text encoder is a folder, or a name of the Hugging Face Hub, '
                        f'owner/name[@revision], or KIND:PLACE with a kind of {", ".join(TEXT_ENCODERS)}')
    import huggingface_hub  # slow to import, and needed only for names of the Hub
    with hub.hub_errors(f'--text-encoder={place}', name['revision']):
        return huggingface_hub.snapshot_download(name['repo'], revision=name['revision'], allow_patterns=list(FILES))


def _digest(folder):
    """SHA-256 over the sorted names of the files that the model is read from, and their own digests."""
    found = hashlib.sha256()
    for name in sorted(name for name in os.listdir(folder) if any(fnmatch.fnmatch(name, one) for one in FILES)):
        found.update(name.encode() + b'\0' + bytes.fromhex(file_digest(os.path.join(folder, name))))
    return found.hexdigest()


# KIND of a reference KIND:PLACE -> (place, device) -> encoder.
TEXT_ENCODERS = {'hf': HuggingFaceEncoder}
