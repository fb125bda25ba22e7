# SPDX-License-Identifier: Apache-2.0
"""Where images go: going on after an interruption, kills at random moments, full disks, exact counts, files that are no images."""

import os
import random
import re
import signal
import subprocess
import time

import numpy as np
import PIL.Image
import pytest
import torch

from tests.support import tiny as tiny_run
from tests.support.unets import ROOT, all_images, contents, refused, run, tiny
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.sampling import writers
from training.sampling.pixels import to_network, to_physical, to_uint8
from training.sampling.writers import Writers, read_image, write_png

FORMATS = ['png', 'npy', 'npz']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Snapshot folders of networks, by kind."""
    root = tmp_path_factory.mktemp('networks')
    networks = {'grey': tiny(), 'rgb': tiny(3, label_dim=3), 'slow': tiny(3, size=128, key='slow'),
                'five': tiny(5, size=[8, 16], units={'offset': [1, 2, 3, 4, 5], 'scale': 10})}
    for name, net in networks.items():
        save_network(net, root / name)
    return root


def last_line(result):
    assert result.exit_code == 0, result.output
    return result.output.strip().splitlines()[-1]


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}


# --- going on

@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('subdirs', [[], ['--subdirs']])
def test_whole_images_are_kept_and_the_others_made(folders, tmp_path, format, subdirs):
    options = ['--seeds=3,998-1002', f'--format={format}', *subdirs]
    whole = run(folders / 'rgb', tmp_path / 'whole', *options)
    assert last_line(whole) == f'6 images ({format}) in {tmp_path / "whole"}'
    some = run(folders / 'rgb', tmp_path / 'out', '--seeds=999,1001', *options[1:])
    assert last_line(some).startswith('2 images')
    before = times(tmp_path / 'out')
    rest = run(folders / 'rgb', tmp_path / 'out', *options, '--skip-existing')
    assert last_line(rest) == f'6 images ({format}) in {tmp_path / "out"}: 4 written, 2 existed already'
    after = times(tmp_path / 'out')
    assert all(after[name] == before[name] for name in before)
    found, expected = contents(tmp_path / 'out'), contents(tmp_path / 'whole')
    if format == 'npz':  # a zip file holds the time it was written
        with np.load(tmp_path / 'out' / list(found)[0]) as a, np.load(tmp_path / 'whole' / list(found)[0]) as b:
            assert np.array_equal(a['image'], b['image']) and a['label'] == b['label']
        assert found.keys() == expected.keys()
    else:
        assert found == expected
    again = run(folders / 'rgb', tmp_path / 'out', *options, '--skip-existing')
    assert last_line(again).endswith('0 written, 6 existed already')


def test_without_skip_existing_all_are_made_again(folders, tmp_path):
    run(folders / 'grey', tmp_path, '--seeds=0-1')
    (tmp_path / '000001.png').write_bytes(b'')
    before = times(tmp_path)
    assert last_line(run(folders / 'grey', tmp_path, '--seeds=0-1')) == f'2 images (png) in {tmp_path}'
    assert all(times(tmp_path)[name] > before[name] for name in before)


@pytest.mark.parametrize('format', FORMATS)
def test_files_that_are_no_whole_images_are_replaced(folders, tmp_path, format):
    options = ['--seeds=0-4', f'--format={format}']
    run(folders / 'rgb', tmp_path, *options)
    paths = sorted(tmp_path.iterdir())
    whole = [read_image(str(path)) for path in paths]
    paths[0].write_bytes(paths[0].read_bytes()[:-20])
    paths[1].write_bytes(b'')
    paths[2].write_bytes(b'nothing of the kind')
    assert last_line(run(folders / 'grey', tmp_path / 'grey', *options)).startswith('5 images')
    paths[3].write_bytes((tmp_path / 'grey' / paths[3].name).read_bytes())  # an image of another network
    result = run(folders / 'rgb', tmp_path, *options, '--skip-existing')
    assert last_line(result).endswith('4 written, 1 existed already')
    assert all(np.array_equal(read_image(str(path)), image) for path, image in zip(paths, whole))


@pytest.mark.parametrize('kind', ['rgb', 'five'])
def test_the_grid_is_whole_where_images_were_there(folders, tmp_path, kind):
    options = ['--seeds=0-8', f'--grid={tmp_path / "grid.png"}']
    run(folders / kind, tmp_path / 'out', *options)
    expected = np.asarray(PIL.Image.open(tmp_path / 'grid.png')).astype(int)
    for path in sorted((tmp_path / 'out').iterdir())[::2]:
        path.unlink()
    assert last_line(run(folders / kind, tmp_path / 'out', *options, '--skip-existing')).endswith('5 written, 4 existed already')
    found = np.asarray(PIL.Image.open(tmp_path / 'grid.png')).astype(int)
    # Pictures come back exactly; other data to float32, which may move a grey level by one.
    assert np.abs(found - expected).max() <= (0 if kind == 'rgb' else 1)


def test_what_files_hold_comes_back_in_network_units():
    batch = torch.linspace(-1.2, 1.2, 3 * 64).reshape(1, 3, 8, 8).double()
    pixels = to_uint8(batch)
    assert torch.equal(to_uint8(to_network(pixels[0].numpy(), None)[None]), pixels)
    units = {'offset': [1, 2, 3], 'scale': 10}
    back = to_network(to_physical(batch, units)[0].numpy(), units)
    torch.testing.assert_close(back, batch[0], rtol=1e-12, atol=1e-12)


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(folders, tmp_path):
    for name in ('.000001.png.4711', '.000009.png.4711', '.000001.png', '.hidden', '000001.png.4711'):
        (tmp_path / name).write_bytes(b'x')
    assert last_line(run(folders / 'grey', tmp_path, '--seeds=0-2', '--skip-existing')).startswith('3 images')
    assert sorted(contents(tmp_path)) == ['.000001.png', '.000009.png.4711', '.hidden', '000000.png', '000001.png', '000001.png.4711',
                                          '000002.png']


def kill_and_go_on(network, tmp_path, kills, seeds, seed=0):
    """Kills generate.py at random moments after its first image, and goes on; every file is whole, the end that of one whole run."""
    out, chance = tmp_path / 'out', random.Random(seed)
    options = [f'--network={network}', f'--seeds=0-{seeds - 1}', '--batch=8', '--steps=1', '--threads=1', '--device=cpu']
    interrupted = 0
    for _ in range(kills):
        before = len(list(out.glob('[0-9]*.png'))) if out.exists() else 0
        process = tiny_run.start([*options, f'--outdir={out}', '--skip-existing'], tmp_path / 'log.txt', script=ROOT / 'generate.py')
        while process.poll() is None and (not out.exists() or len(list(out.glob('[0-9]*.png'))) == before):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        interrupted += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for path in out.glob('[0-9]*.png'):
            assert np.asarray(PIL.Image.open(path)).shape == (128, 128, 3)
    there = len(list(out.glob('[0-9]*.png')))
    assert interrupted >= kills * 0.8 and 0 < there < seeds, (interrupted, there)
    output = tiny_run.finish([*options, f'--outdir={out}', '--skip-existing'], tmp_path / 'log.txt', script=ROOT / 'generate.py')
    assert f'{seeds - there} written, {there} existed already' in output
    tiny_run.finish([*options, f'--outdir={tmp_path / "whole"}'], tmp_path / 'log.txt', script=ROOT / 'generate.py')
    assert contents(out) == contents(tmp_path / 'whole') and len(contents(out)) == seeds


def test_two_kills(folders, tmp_path):
    kill_and_go_on(folders / 'slow', tmp_path, kills=2, seeds=48)


@pytest.mark.slow
def test_twenty_kills(folders, tmp_path):
    kill_and_go_on(folders / 'slow', tmp_path, kills=20, seeds=480, seed=1)


# --- full disks

@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where one can be mounted."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(folder)], capture_output=True).returncode:
        pytest.skip('no file system can be mounted here')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


def test_a_full_disk(folders, small_disk, tmp_path):
    """64 KiB hold the folder and at most 16 small files."""
    result = run(folders / 'rgb', small_disk, '--seeds=0-39', '--batch=8')
    line = refused(result)
    files = sorted(path.name for path in small_disk.iterdir())
    assert re.fullmatch(rf'Error: \S+: No space left on device; {len(files)} of 40 images were written; free disk space, and resume with '
                        r'--skip-existing', line), line
    assert 0 < len(files) <= 16 and all(read_image(str(small_disk / name)).shape == (3, 8, 8) for name in files)
    subprocess.run(['mount', '-o', 'remount,size=1m', str(small_disk)], check=True)
    assert last_line(run(folders / 'rgb', small_disk, '--seeds=0-39', '--skip-existing')).endswith(
        f'{40 - len(files)} written, {len(files)} existed already')
    run(folders / 'rgb', tmp_path / 'whole', '--seeds=0-39')
    assert contents(small_disk) == contents(tmp_path / 'whole')


def test_a_disk_that_fills_up_is_told_with_the_count(folders, tmp_path, monkeypatch):
    def full(path, image):
        if int(os.path.basename(path)[:6]) >= 5:
            raise OSError(28, 'No space left on device')  # as a write to an open file raises it: without a name
        write_png(path, image)

    monkeypatch.setattr(writers, 'write_png', full)
    line = refused(run(folders / 'rgb', tmp_path, '--seeds=0-19', '--batch=4'))
    assert re.search(r'/0000\d\d.png: No space left on device; 5 of 20 images were written; free disk space', line), line
    assert sorted(contents(tmp_path)) == [f'{seed:06d}.png' for seed in range(5)]


# --- counts and overlap

def test_writers_count_what_came_to_a_good_end():
    def work(i):
        time.sleep(0.002)
        if i == 30:
            raise OSError('full')
        done.append(i)

    for backlog in (1, 8, 256):
        done = []
        writers = Writers(backlog=backlog)
        with pytest.raises(OSError, match='full'), writers:
            for i in range(100):
                writers.submit(work, i)
        assert writers.written == len(done) >= 30 - 4, backlog


def test_writing_goes_on_while_the_caller_works():
    """40 files of 10 ms each beside 40 batches of 10 ms: together much less than the 0.8 s one after the other."""
    start = time.perf_counter()
    with Writers(threads=4) as writers:
        for _ in range(40):
            writers.submit(time.sleep, 0.01)
            time.sleep(0.01)
    assert writers.written == 40 and time.perf_counter() - start < 0.7


def test_counts_over_ranks(folders, tmp_path):
    """The missing images are shared out anew, so that each rank has as much to do."""
    options = [f'--network={folders / "rgb"}', f'--outdir={tmp_path / "out"}', '--seeds=0-9', '--steps=2', '--threads=1', '--device=cpu']
    log = tmp_path / 'log.txt'
    tiny_run.finish([*options[:2], '--seeds=0,2,4,6', *options[3:]], log, script=ROOT / 'generate.py')
    output = tiny_run.finish([*options, '--skip-existing'], log, ranks=2, script=ROOT / 'generate.py')
    assert output.count('10 images (png)') == 1 and '6 written, 4 existed already' in output
    expected = to_uint8(all_images(load_network(folders / 'rgb'), range(10), num_steps=2))
    for seed in range(10):  # threads may differ between this process and those: by one grey level
        found = read_image(str(tmp_path / 'out' / f'{seed:06d}.png'))
        assert np.abs(found.astype(int) - expected[seed].numpy()).max() <= 1
