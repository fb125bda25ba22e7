# SPDX-License-Identifier: Apache-2.0
"""Text encoders: labels that depend on their caption alone, CLIP and others from the package transformers, and what is refused."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch

from dnnlib import UserError, text_record
from tests.support import words
from training.data import text

CAPTIONS = ['a red square', '', 'a blue square', 'big', 'a small red square', 'a red square', 'blue', 'red', 'square', 'a big one']


@pytest.fixture
def ready(monkeypatch):
    words.register(monkeypatch)


def test_pooled_labels_have_norm_1_and_are_those_of_their_captions(ready):
    made = text.open_captions('words:x')
    labels = made(CAPTIONS)
    assert labels.dtype == np.float32 and labels.shape == (10, words.DIM)
    assert np.linalg.norm(labels, axis=1) == pytest.approx(1, abs=1e-6)
    encoder = words.Words('x', None)
    expected = torch.stack([encoder.word(word) for word in ['^', 'a', 'red', 'square', '_', '_']]).sum(0)
    assert labels[0] == pytest.approx((expected / expected.norm()).numpy(), abs=1e-6)
    assert (labels[1] == made.empty).all()
    assert made.record == {'encoder': 'words:x', 'sha256': encoder.sha256, 'pooling': 'sum', 'normalised': True, 'dim': words.DIM,
                           'length': words.LENGTH, 'tokens': None}


def test_sequences_are_as_the_encoder_gives_them(ready):
    made = text.open_captions('words:x', tokens=4)
    encoder = words.Words('x', None)
    expected = torch.cat([encoder.word(word) for word in ['^', 'a', 'red', 'square']])
    assert (made(['a red square'])[0] == expected.numpy()).all()  # neither normalised nor scaled
    assert made.record | {'pooling': 'tokens', 'tokens': 4, 'length': 4, 'normalised': False, 'dim': words.DIM} == made.record
    assert text_record.label_dim(made.record) == len(made.empty) == 4 * words.DIM
    with pytest.raises(UserError, match=r'--tokens=7: words:x takes 1 to 6 tokens'):
        text.open_captions('words:x', tokens=7)


def test_every_call_has_the_same_number_of_rows(ready, monkeypatch):
    made = []
    monkeypatch.setitem(text.TEXT_ENCODERS, 'words', lambda *args: made.append(words.Words(*args)) or made[-1])
    labels = text.open_captions('words:x')(CAPTIONS)
    one_by_one = np.concatenate([text.open_captions('words:x')([caption]) for caption in CAPTIONS])
    assert {size for encoder in made for size in encoder.calls} == {text.ROWS}
    assert (labels == one_by_one).all()


def test_values_that_are_not_finite_are_refused(ready, monkeypatch):
    monkeypatch.setattr(words.Words, 'word', lambda self, word: torch.full([words.DIM], float('nan')))
    with pytest.raises(UserError, match='--text-encoder=words:x: gives values that are not finite'):
        text.open_captions('words:x')


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)  # which makes its import fail
    with pytest.raises(UserError, match='--text-encoder=anything: needs the package transformers: pip install transformers'):
        text.open_captions('anything')


GOOD = {'encoder': 'e', 'sha256': 64 * 'a', 'pooling': 'mean', 'normalised': True, 'dim': 3, 'length': 9, 'tokens': None}


def test_records_are_checked_and_compared():
    assert text_record.checked({**GOOD, 'empty': [1]}) == GOOD
    for wrong in ([], {}, {**GOOD, 'dim': 0}, {**GOOD, 'dim': '3'}, {**GOOD, 'sha256': 'a'}, {**GOOD, 'normalised': 1},
                  {**GOOD, 'tokens': 0}, {**GOOD, 'tokens': True}, {**GOOD, 'length': -1}):
        with pytest.raises(ValueError, match='as dataset_tool.py captions writes it'):
            text_record.checked(wrong)
    assert text_record.difference(GOOD, {**GOOD, 'encoder': 'elsewhere'}) is None  # the same files in another place
    assert text_record.difference(None, None) is None
    assert text_record.difference(GOOD, {**GOOD, 'sha256': 64 * 'b'}) == 'another text encoder: e (aaaaaaaa), and e (bbbbbbbb)'
    assert text_record.difference(GOOD, {**GOOD, 'tokens': 2}) == 'another number of tokens: none, and 2'
    assert 'labels of another kind' in text_record.difference(GOOD, None)


# --- the package transformers


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    """(transformers, {class: folder of a tiny model})."""
    transformers = pytest.importorskip('transformers')
    root = tmp_path_factory.mktemp('clip')
    return transformers, {kind: words.make_clip(root / kind, kind) for kind in ('CLIPTextModelWithProjection', 'CLIPTextModel')}


@pytest.mark.parametrize('kind, output, pooling', [('CLIPTextModelWithProjection', 'text_embeds', 'projected'),
                                                   ('CLIPTextModel', 'pooler_output', 'pooled')])
def test_clip_gives_the_output_of_its_class(clip, kind, output, pooling):
    transformers, folders = clip
    net = getattr(transformers, kind).from_pretrained(folders[kind]).eval()
    ids = torch.tensor([[0, 3, 4, 6, 1, 1, 1, 1]])  # "a red square" between its ends, padded
    with torch.no_grad():
        found = net(input_ids=ids)
    expected = torch.nn.functional.normalize(found[output], dim=1)[0]
    made = text.open_captions(folders[kind])
    assert made(CAPTIONS)[0] == pytest.approx(expected.numpy(), abs=1e-6)
    assert (made.record['pooling'], made.record['length']) == (pooling, 8)
    tokens = text.open_captions(folders[kind], tokens=8)(['a red square'])[0]
    assert tokens == pytest.approx(found.last_hidden_state.flatten().numpy(), abs=1e-6)


def test_other_models_give_the_mean_over_the_caption_alone(clip, tmp_path):
    transformers, folders = clip
    shutil.copytree(folders['CLIPTextModel'], tmp_path / 'bert')
    config = transformers.BertConfig(vocab_size=len(words.WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8, max_position_embeddings=8)
    net = transformers.BertModel(config, add_pooling_layer=False).eval()
    net.save_pretrained(tmp_path / 'bert')
    with torch.no_grad():
        alone = net(input_ids=torch.tensor([[0, 3, 4, 6, 1]])).last_hidden_state[0].mean(0)  # without any padding
    made = text.open_captions(str(tmp_path / 'bert'))
    assert made.record['pooling'] == 'mean'
    assert made(['a red square'])[0] == pytest.approx((alone / alone.norm()).numpy(), abs=1e-6)


def test_the_digest_is_that_of_the_files_that_count(clip, tmp_path):
    folder = clip[1]['CLIPTextModel']
    digest = text.open_captions(folder).record['sha256']
    copy = shutil.copytree(folder, tmp_path / 'copy')
    (copy / 'notes.md').write_text('of no consequence')
    assert text.open_captions(str(copy)).record['sha256'] == digest
    tokenizer = (copy / 'tokenizer.json').read_text()
    (copy / 'tokenizer.json').write_text(tokenizer.replace('"red"', '"RED"'))
    assert text.open_captions(str(copy)).record['sha256'] != digest


def test_what_cannot_be_read_is_one_line(clip, tmp_path):
    folder = clip[1]['CLIPTextModel']
    spoil, other = lambda path: path.write_bytes(b'x'), '{"model_type": "clip_text_model", "architectures": ["CLIPModel"]}'
    for name, damage in (('config.json', os.unlink), ('model.safetensors', os.unlink), ('model.safetensors', spoil),
                         ('config.json', lambda path: path.write_text(other))):
        broken = shutil.copytree(folder, tmp_path / 'broken', dirs_exist_ok=True)
        damage(broken / name)
        with pytest.raises(UserError, match=f'^--text-encoder={broken}: ') as caught:
            text.open_captions(str(broken))
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match='--text-encoder=/no/where/at/all: no such folder'):
        text.open_captions('/no/where/at/all')


def test_weights_are_never_unpickled(clip, tmp_path):
    """A folder with weights in a pickle alone is refused, and the pickle is not opened."""
    broken = shutil.copytree(clip[1]['CLIPTextModel'], tmp_path / 'pickled')
    os.unlink(broken / 'model.safetensors')
    torch.save({}, broken / 'pytorch_model.bin')
    with pytest.raises(UserError, match='safetensors'):
        text.open_captions(str(broken))
