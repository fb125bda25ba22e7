# SPDX-License-Identifier: Apache-2.0
"""What results of eval_fid.py tell of generated images, and where they go: records of folders, networks, names that hold what differs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import eval_fid
import generate
from dnnlib.files import file_digest
from tests.support.unets import tiny
from torch_utils import misc
from training.checkpoints.save import save_network

COMMON = ['--ref-path=ref.npy', '--detector=pixels', '--metrics=fid']


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp('networks')
    for name in ('a', 'b'):
        save_network(tiny(key=name), root / name)
    return root


@pytest.fixture
def work(tmp_path, networks, monkeypatch):
    """A working folder with the network a and reference images."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(networks / 'a', 'net')
    np.save('ref.npy', np.random.default_rng(5).integers(0, 256, (30, 8, 8), dtype=np.uint8))
    return tmp_path


def call(script, *args):
    result = CliRunner().invoke(script.main, [str(arg) for arg in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def make(outdir, *options, network='net'):
    call(generate, f'--network={network}', f'--outdir={outdir}', '--seeds=0-3', '--steps=2', *options)


def evaluate(*args):
    return call(eval_fid, *args, *COMMON)


def read(path):
    return json.loads(Path(path).read_text())


# --- folders and their records

def test_a_folder_is_told_with_its_record_and_digest(work):
    """Not null, and no option of samplers that nothing used."""
    make('out')
    evaluate('--gen-path=out', '--num=4')
    result = read('out.fid.json')
    assert result['generated'] == {'path': 'out', 'sha256': file_digest('out'), 'record': read('out.json')}
    assert result['options'].keys() == {'gen_path', 'ref_path', 'detector', 'metrics', 'num'}
    assert result['threads'] and result['device'] == 'cpu' and 'gpu' not in result


@pytest.mark.parametrize('change, words', [
    (lambda: Path('out/000002.png').unlink(), '1 images that it lists are missing, such as 000002.png'),
    (lambda: shutil.copy('out/000000.png', 'out/cat.png'), '1 images are not listed in it, such as cat.png'),
    (lambda: Path('out.json').write_text(json.dumps({**read('out.json'), 'image_shape': [3, 8, 8]})), 'is of images of shape [3, 8, 8]'),
    (lambda: Path('out.json').write_text('{}'), 'is not a record of generated images'),
    (lambda: Path('out.json').write_text('{'), 'not a JSON file')])
def test_a_record_of_other_images_is_not_taken_over(work, change, words):
    make('out')
    change()
    result = evaluate('--gen-path=out', f'--num={len(list(Path("out").iterdir()))}')
    warnings = [line for line in result.output.splitlines() if line.startswith('Warning')]
    assert len(warnings) == 1 and words in warnings[0] and 'does not say how the images were generated' in warnings[0]
    generated = read('out.fid.json')['generated']
    assert generated['record'] is None and words in generated['record_missing']


def test_two_sets_in_one_folder_never_pass_as_one(work, networks):
    """Whatever the way: two networks, and two step counts."""
    make('out')
    for options, network in ((['--steps=3'], 'net'), ([], networks / 'b')):
        for more in (['--skip-existing', '--seeds=0-7'], ['--seeds=4-7']):
            result = CliRunner().invoke(generate.main, [f'--network={network}', '--outdir=out', '--steps=2', *options, *more])
            assert result.exit_code == 1 and 'made with other options' in result.output


# --- a network

def test_a_network_is_told_as_the_record_of_its_folder(work):
    make('out')
    evaluate('--network=net', '--seeds=0-3', '--num=4', '--steps=2')
    generated, record = read('net.heun2-pixels-4.fid.json')['generated'], read('out.json')
    of_files = {'kind', 'format', 'subdirs', 'num_images', 'complete', 'made_by'}
    assert generated == {key: value for key, value in record.items() if key not in of_files}
    assert {'S_churn', 'gnet_weights', 'guidance_interval', 'labels', 'class_idx'}.isdisjoint(generated)
    assert {'S_churn', 'gnet_weights', 'guidance_interval', 'labels'}.isdisjoint(read('net.heun2-pixels-4.fid.json')['options'])


def test_steps_leave_a_file_each(work):
    few = ['--network=net', '--seeds=0-3', '--num=4']
    evaluate(*few, '--steps=3')
    evaluate(*few, '--steps=6')
    evaluate(*few, '--steps=3', '--S-churn=4')
    evaluate(*few, '--steps=3', '--S-churn=5')
    names = sorted(path.name for path in work.glob('*.fid.json'))
    assert len(names) == 4 and {'net.heun3-pixels-4.fid.json', 'net.heun6-pixels-4.fid.json'} <= {*names}
    assert read('net.heun3-pixels-4.fid.json')['generated']['evaluations'] == 5
    assert all(name.startswith('net.heun3-pixels-4-') for name in names[:2] if '-4-' in name)


def test_repeats_and_other_seeds_have_names_of_their_own(work):
    evaluate('--network=net', '--seeds=0-3', '--num=4', '--steps=2', '--repeats=2')
    evaluate('--network=net', '--seeds=4-7', '--num=4', '--steps=2')
    other, repeats = sorted((path.name for path in work.glob('*.fid.json')), key=lambda name: '2x4' in name)
    assert repeats == 'net.heun2-pixels-2x4.fid.json' and other.startswith('net.heun2-pixels-4-')


# --- one name, several results

def test_another_reference_and_other_images_keep_the_earlier_figures(work):
    make('out')
    evaluate('--gen-path=out', '--num=4')
    first = read('out.fid.json')
    np.save('other.npy', np.zeros((30, 8, 8), np.uint8) + np.arange(30, dtype=np.uint8)[:, None, None])
    output = evaluate('--gen-path=out', '--num=4', '--ref-path=other.npy', '--ref-path=ref.npy').output  # the last counts: the same
    assert 'earlier' not in output and len(list(work.glob('*.fid.json'))) == 1
    output = call(eval_fid, '--gen-path=out', '--num=4', *COMMON, '--ref-path=other.npy').output
    assert f'the earlier result, against another reference, is now {work / "out.1.fid.json"}' in output
    assert read('out.1.fid.json')['fid_score'] == first['fid_score'] != read('out.fid.json')['fid_score']
    make('out', '--sampler=euler', '--seeds=0-3')
    output = call(eval_fid, '--gen-path=out', '--num=4', *COMMON, '--ref-path=other.npy').output
    assert f'of other images, is now {work / "out.2.fid.json"}' in output and len(list(work.glob('*.fid.json'))) == 3


def test_other_metrics_of_the_same_images_join(work):
    make('out')
    shared = ['--gen-path=out', '--num=4', '--ref-path=ref.npy', '--detector=pixels', '--kid-subset-size=3', '--kid-subsets=2']
    call(eval_fid, *shared, '--metrics=kid')
    kid = read('out.fid.json')
    output = call(eval_fid, *shared, '--metrics=fid').output
    result = read('out.fid.json')
    assert 'kept from the earlier result: kid, kid_std' in output and len(list(work.glob('*.fid.json'))) == 1
    assert result['kid'] == kid['kid'] and result['fid_score'] > 0 and set(result['metrics']['names']) == {'fid', 'kid'}
    call(eval_fid, *shared[:-1], '--kid-subsets=3', '--metrics=fid')  # kid would be told with settings that it does not have
    assert 'kid' not in read('out.fid.json') and read('out.1.fid.json')['kid'] == kid['kid']


def test_a_digest_of_a_network_is_that_of_its_weights(work, networks):
    evaluate('--network=net', '--seeds=0-3', '--num=4', '--steps=2')
    assert read('net.heun2-pixels-4.fid.json')['generated']['sha256'] == misc.state_digest(tiny(key='a'))
    shutil.rmtree('net')
    shutil.copytree(networks / 'b', 'net')
    assert 'of other images, is now' in evaluate('--network=net', '--seeds=0-3', '--num=4', '--steps=2').output
