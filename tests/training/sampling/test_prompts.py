# SPDX-License-Identifier: Apache-2.0
"""Prompts: which seed gets which caption, by which text encoder, what is refused, and guidance against the empty caption."""

import numpy as np
import pytest
import torch

from dnnlib import EasyDict, UserError
from tests.support import words
from tests.support.unets import all_images, tiny
from torch_utils import misc
from training.data import text
from training.sampling import guidance, labels, pieces, prompts, record
from training.sampling.generate import ConditionedDenoiser, SeededDraws, guided


@pytest.fixture
def net(monkeypatch):
    """A network trained on captions by words:x."""
    words.register(monkeypatch)
    made = text.open_captions('words:x')
    found = tiny(label_dim=words.DIM, text=made.record, label_dropout=0.1)
    found.set_null_label(torch.from_numpy(made.empty))
    for p in found.parameters():
        p.data *= 4  # so that captions matter
    return found


def of(caption):
    return text.open_captions('words:x')([caption])[0]


def told(source, seeds):
    return source(SeededDraws(seeds), seeds).numpy()


def test_one_caption_for_all_seeds(net):
    source = prompts.pick(net, 'a red square')
    assert (told(source, [0, 7]) == of('a red square')).all() and source.prompts == ['a red square']


def test_seed_s_has_line_s_modulo_their_number(net, tmp_path):
    (tmp_path / 'p.txt').write_text('red\n\n  blue  \n')
    source = prompts.pick(net, str(tmp_path / 'p.txt'))
    expected = {'red': of('red'), '': np.zeros(words.DIM), 'blue': of('blue')}
    for seed, caption in [(0, 'red'), (1, ''), (2, 'blue'), (3, 'red'), (10 ** 9, ''), (11, 'blue')]:
        assert told(source, [seed])[0] == pytest.approx(expected[caption], abs=0), seed


def test_a_prompt_leaves_the_draws_of_a_seed_as_they_are(net):
    first, second = SeededDraws([3]), SeededDraws([3])
    labels.uniform(5)(first, [3])
    prompts.pick(net, 'red')(second, [3])
    assert torch.equal(first.randn([4]), second.randn([4]))


def test_a_text_encoder_without_a_prompt_is_refused(net):
    options = EasyDict(labels=None, class_idx=None, prompt=None, text_encoder='words:x')
    with pytest.raises(UserError, match='--text-encoder=words:x: reads the captions of --prompt; add one, or leave it out'):
        pieces.Networks().labels(net, [0], options)


def test_the_empty_prompt_needs_no_text_encoder(net, monkeypatch):
    monkeypatch.delitem(text.TEXT_ENCODERS, 'words')
    assert not told(prompts.pick(net, ''), [0]).any()


def test_the_empty_caption_and_no_label_are_the_same_image(net):
    made = [all_images(net, [0, 1], labels=source) for source in (None, prompts.pick(net, ''), labels.listed(torch.stack(
        [torch.from_numpy(of(''))] * 2)))]
    assert torch.equal(made[0], made[1]) and torch.allclose(made[0], made[2], atol=1e-6)
    assert (all_images(net, [0, 1], labels=prompts.pick(net, 'red')) - made[0]).abs().max() > 1e-3


def test_guidance_goes_away_from_the_empty_caption(net):
    """D_empty + w (D_caption - D_empty), with the embedding of the empty caption given by hand."""
    x, sigma = torch.randn(2, 1, 8, 8, generator=misc.generator('x')), torch.tensor(1.5)
    label = torch.from_numpy(of('red')).expand(2, -1)
    with torch.no_grad():
        D_1, D_0 = (ConditionedDenoiser(net, one)(x, sigma) for one in (label, torch.from_numpy(of('')).expand(2, -1)))
        found = guided(net, label, guidance.Guidance(3.0))(x, sigma)
    assert torch.allclose(found, D_0 + 3 * (D_1 - D_0), atol=1e-5) and (D_1 - D_0).abs().max() > 1e-4


def test_another_text_encoder_is_refused_by_name(net):
    with pytest.raises(UserError, match='--text-encoder=words:y: is not the one that the network was trained with: another text encoder: '
                                        'words:x .*, and words:y'):
        prompts.pick(net, 'red', 'words:y')
    net.text = {**net.text, 'encoder': 'words:gone', 'length': 5}
    with pytest.raises(UserError, match='another text encoder'):
        prompts.pick(net, 'red')
    assert (told(prompts.pick(tiny_like(net), 'red', 'words:x'), [0]) == of('red')).all()  # another place, the same files


def tiny_like(net):
    return EasyDict(text={**net.text, 'length': words.LENGTH}, label_dim=net.label_dim)


def test_what_is_no_prompt_is_refused(net, tmp_path):
    for other, message in [(tiny(), 'is unconditional; leave the option out'),
                           (tiny(label_dim=3), 'has 3 classes; give --class or --labels')]:
        with pytest.raises(UserError, match=f'--prompt=red: the network was not trained on captions, it {message}'):
            prompts.pick(other, 'red')
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'bytes.txt').write_bytes(b'\xff\xfe\x00')
    for name, message in [('none.txt', 'no such file'), ('empty.txt', 'is empty'), ('bytes.txt', 'cannot be read as text')]:
        with pytest.raises(UserError, match=f'--prompt={tmp_path / name}: {message}'):
            prompts.pick(net, str(tmp_path / name))
    o = EasyDict(prompt='red', class_idx=None, labels='uniform', device='cpu')
    with pytest.raises(UserError, match='--prompt and --labels exclude each other'):
        pieces.pick_prompts(net, o)


@pytest.mark.parametrize('spec, class_idx', [(None, None), ('uniform', None), (None, 1)])
def test_classes_are_refused_for_captions(net, spec, class_idx):
    with pytest.raises(UserError, match='was trained on captions; give --prompt'):
        pieces.pick_labels(net, [0], spec, class_idx)


def test_files_of_classes_are_refused_and_vectors_are_not(net, tmp_path):
    np.save(tmp_path / 'classes.npy', np.arange(5))
    np.save(tmp_path / 'rows.npy', np.ones([5, words.DIM], np.float32))
    with pytest.raises(UserError, match='it has classes, and the network was trained on captions'):
        pieces.pick_labels(net, [0], str(tmp_path / 'classes.npy'), None)
    assert pieces.pick_labels(net, [0], str(tmp_path / 'rows.npy'), None).table.shape == (5, words.DIM)


def test_records_tell_prompts_by_the_digest_of_their_texts(net, tmp_path):
    def of_file(name, content):
        (tmp_path / name).write_text(content)
        return describe(str(tmp_path / name))

    def describe(prompt):
        return record.describe_labels(EasyDict(prompt=prompt, class_idx=None, labels=None), prompts.pick(net, prompt))

    first, moved, other = of_file('a.txt', 'red\nblue'), of_file('b.txt', 'red\nblue\n'), of_file('c.txt', 'red\ngreen')
    assert first['source'] == 'prompt' and first['prompts'] == 2 and first['encoder_sha256'] == net.text['sha256']
    assert describe('red')['prompt'] == 'red'
    full = lambda found: {'labels': found}
    assert not record.differences(full(first), full(moved))
    assert record.differences(full(first), full(other)) == [
        f'--labels: prompt:{tmp_path / "a.txt"} ({first["sha256"][:8]}), now prompt:{tmp_path / "c.txt"} ({other["sha256"][:8]})']
    assert not record.differences(full(describe('red')), full(of_file('d.txt', 'red')))
