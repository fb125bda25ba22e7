# SPDX-License-Identifier: Apache-2.0
"""Text from end to end, by command line: captions, training, prompts, evaluation; with a text encoder of a few lines, and with CLIP."""

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import dataset_tool
import eval_fid
import generate
import train
from tests.support import ROOT, launch, tiny, words
from training.checkpoints.load import load_network
from training.data.dataset import ImageDataset

TRAIN = ['--cond=1', '--label-dropout=0.2', '--cbase=16', '--cres=1', '--blocks=1', '--attn=0', '--dropout=0', '--augment=0', '--batch=32',
         '--lr=5e-3', '--lr-rampup=0', '--ema=0.0003', '--tick=2', '--snap=1', '--dump=1', '--samples=2', '--seed=1', '--threads=1']
RED, BLUE = 'a red square', 'a blue square'


def run(script, *args):
    result = CliRunner().invoke(script.main, [str(arg) for arg in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def make_set(folder, encoder):
    """A zip of 64 red and blue squares of 4x4 pixels on black, 8x8, with their captions as labels."""
    source, rng = np.random.default_rng(0), {RED: (230, 30, 30), BLUE: (30, 30, 230)}
    (folder / 'img').mkdir()
    captions = [(RED, BLUE)[i % 2] for i in range(64)]
    for i, caption in enumerate(captions):
        image = np.full([8, 8, 3], 20, np.uint8)
        y, x = source.integers(0, 5, 2)
        image[y:y + 4, x:x + 4] = rng[caption]
        Image.fromarray(image).save(folder / 'img' / f'{i:02}.png')
    (folder / 'captions.txt').write_text('\n'.join(captions))
    run(dataset_tool, f'--source={folder / "img"}', f'--dest={folder / "set.zip"}', f'--captions={folder / "captions.txt"}', '--sheet=none',
        '--workers=1')
    run(dataset_tool, 'captions', f'--source={folder / "set.zip"}', f'--text-encoder={encoder}')
    return folder / 'set.zip'


def follows(folder):
    """Of each image in a folder, by how much its red is above its blue."""
    pixels = np.stack([np.asarray(Image.open(path), np.float64) for path in sorted(folder.glob('*.png'))])
    means = pixels.mean((1, 2))
    return means[:, 0] - means[:, 2]


@pytest.fixture(params=['words', 'clip'], scope='module')
def trained(request, tmp_path_factory):
    """(folder with set.zip and run/, reference of the text encoder)."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        words.register(patch)
        if request.param == 'clip':
            pytest.importorskip('transformers')
        encoder = 'words:x' if request.param == 'words' else words.make_clip(folder / 'clip')
        data = make_set(folder, encoder)
        out = run(train, f'--outdir={folder / "run"}', '--nosubdir', f'--data={data}', *TRAIN,
                  f'--duration={0.002 if request.param == "words" else 0.0005}')
        assert '--prompt="a caption"' in out  # in the command that is proposed
        yield folder, encoder


def snapshot(folder):
    return sorted((folder / 'run').glob('network-snapshot-*'))[-1]


def test_from_captions_to_images_of_prompts_and_their_evaluation(trained):
    folder, encoder = trained
    config = json.loads((snapshot(folder) / 'config.json').read_text())
    data = ImageDataset(folder / 'set.zip', use_labels=True)
    assert config['text'] == data.text and config['text']['encoder'] == encoder and config['label_dropout'] == 0.2
    net = load_network(snapshot(folder))
    assert (net.model.map_label.null_label.numpy() == data.empty).all()
    (folder / 'p.txt').write_text(f'{RED}\n{BLUE}\n')
    run(generate, f'--network={snapshot(folder)}', f'--outdir={folder / "both"}', '--seeds=0-7', f'--prompt={folder / "p.txt"}',
        '--steps=6', '--guidance=2', '--threads=1')
    told = json.loads((folder / 'both.json').read_text())['labels']
    assert (told['source'], told['prompts'], told['encoder_sha256']) == ('prompt', 2, data.text['sha256'])
    if encoder == 'words:x':  # which is trained for longer
        found = follows(folder / 'both')
        assert found[::2].mean() > 25 and found[1::2].mean() < -25, found  # of squares in the data: 50
    run(eval_fid, 'ref', f'--data={folder / "set.zip"}', f'--dest={folder / "ref.npz"}', '--detector=pixels')
    for source, labels in (('prompt', f'--prompt={folder / "p.txt"}'), ('dataset', f'--labels=dataset:{folder / "set.zip"}')):
        run(eval_fid, f'--network={snapshot(folder)}', f'--ref-stats={folder / "ref.npz"}', '--detector=pixels', '--num=8', '--seeds=0-7',
            '--steps=2', '--metrics=fid', '--batch-size=8', labels, f'--out-path={folder / source}.json')
        assert f'"source": "{source}"' in (folder / f'{source}.json').read_text()


def test_swapped_captions_change_the_labels_of_a_run(trained, capsys):
    folder, _ = trained
    flags = ['--cond=1', '--augment=0', '--label-corruption=0.25', '--cres=1', f'--data={folder / "set.zip"}']
    made = tiny.make_run(folder, *flags)
    assert '16 of 64 images carry a wrong label' in capsys.readouterr().out
    own, seen = ImageDataset(folder / 'set.zip', use_labels=True).labels(range(64)), {}
    for _ in range(24):
        batch = made.data.feed.next()
        for image, label in zip(batch.raw_idx.tolist(), batch.class_labels.numpy()):
            assert (seen.setdefault(image, label) == label).all()  # the same at each visit
    made.data.feed.close()
    wrong = [image for image, label in seen.items() if (label != own[image]).any()]
    assert len(seen) == 64 and len(wrong) == 16
    assert all((seen[image] == own[image ^ 1]).all() for image in wrong)  # the other of the two captions
    assert (made.net.model.map_label.null_label.numpy() == ImageDataset(folder / 'set.zip', use_labels=True).empty).all()


def test_a_run_continues_exactly(trained, tmp_path):
    folder, _ = trained
    if folder.name.startswith('clip'):
        pytest.skip('as with the other text encoder')
    kept = [flag for flag in TRAIN if flag not in ('--samples=2', '--tick=2')]
    common = [f'--data={folder / "set.zip"}', '--nosubdir', *kept, '--samples=0', '--tick=0.064']
    run(train, f'--outdir={tmp_path / "whole"}', *common, '--duration=0.000256')
    run(train, f'--outdir={tmp_path / "parts"}', *common, '--duration=0.000128')
    run(train, f'--outdir={tmp_path / "parts"}', *common, '--duration=0.000256', '--resume=latest')
    one, other = (load_network(tmp_path / name / 'network-snapshot-000000.256').state_dict() for name in ('whole', 'parts'))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_refusals_of_the_commands(trained, tmp_path):
    folder, encoder = trained
    result = CliRunner().invoke(generate.main, [f'--network={snapshot(folder)}', f'--outdir={tmp_path / "o"}', '--seeds=0'])
    assert result.exit_code == 1 and 'give --prompt=TEXT' in result.output and not list(tmp_path.rglob('*.*'))
    result = CliRunner().invoke(train.main, [f'--outdir={tmp_path / "r"}', f'--data={folder / "set.zip"}', *TRAIN, '--duration=0.001',
                                             '--label-corruption=0.1', '--label-corruption-groups=0,1'])
    assert result.exit_code == 1 and '--label-corruption-groups=[[0, 1]]: groups are of classes' in result.output
    assert not (tmp_path / 'r').exists()


MINE = """import sys
sys.path.insert(0, {root!r})
from tests.support.words import Words
from training.data import text
text.TEXT_ENCODERS['words'] = Words
import generate
generate.main()
"""


@pytest.mark.slow
def test_two_ranks_give_the_images_of_one(trained, tmp_path):
    """Only rank 0 embeds the prompts; here by a text encoder that a script of one's own registers."""
    folder, encoder = trained
    (tmp_path / 'mine.py').write_text(MINE.format(root=str(ROOT)))
    (tmp_path / 'p.txt').write_text(f'{RED}\n{BLUE}\n')
    for ranks in (1, 2):
        done = launch.run(tmp_path / 'mine.py', [f'--network={snapshot(folder)}', f'--outdir={tmp_path / str(ranks)}', '--seeds=0-5',
                                                 f'--prompt={tmp_path / "p.txt"}', '--steps=2', '--threads=1'], ranks=ranks,
                          env={'PYTHONPATH': ':'.join([str(ROOT), *sys.path])})
        assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob('*.png')} for name in ('1', '2'))
    assert len(one) == 6 and one == two
