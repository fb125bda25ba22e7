# SPDX-License-Identifier: Apache-2.0
"""EDM's and EDM2's pickles read as data: right when they are what they should be, refused in one line otherwise, and never executed."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from dnnlib import EasyDict, UserError
from tests.support import GOLDEN, ROOT, edm_pickle
from torch_utils import legacy_pickle, misc
from training.networks import preconditioning

DATA = GOLDEN / 'hub' / 'edm_pickle'  # a snapshot that EDM's own code wrote, its source text left out
EDM2 = GOLDEN / 'edm2' / 'pickles'  # likewise of EDM2, in the layouts of today's and of older PyTorch and NumPy
CONFIG = {'img_resolution': 8, 'img_channels': 2, 'model_type': 'SongUNet', 'model_channels': 4, 'channel_mult': [1, 2], 'num_blocks': 1,
          'attn_resolutions': [4], 'augment_dim': 9, 'embedding_type': 'fourier', 'encoder_type': 'residual',
          'resample_filter': [1, 3, 3, 1]}


def build(seed=0, **config):
    with misc.seeded(seed):
        return preconditioning.build_network({**CONFIG, **config}).eval().requires_grad_(False)


@pytest.fixture
def write(tmp_path):
    """Writes bytes as a snapshot; returns its path."""
    def write(data):
        path = tmp_path / 'network-snapshot-000001.pkl'
        path.write_bytes(data)
        return path
    return write


@pytest.fixture
def refused(write):
    """The one line that bytes are refused with."""
    def refused(data):
        path = write(data)
        with pytest.raises(UserError) as error:
            legacy_pickle.read_network(path)
        assert '\n' not in error.value.message and error.value.message.startswith(f'{path}: ')
        assert len(error.value.message) < len(str(path)) + 300
        return error.value.message
    return refused


# --- what is read

def test_a_published_snapshot_gives_the_published_output():
    name, arguments, state = legacy_pickle.read_network(DATA / 'network-snapshot.pkl')
    assert name == 'EDMPrecond' and arguments == json.loads((DATA / 'config.json').read_text())
    net = preconditioning.build_network(arguments).eval()
    net.load_state_dict(state)
    io = safetensors.torch.load_file(DATA / 'io.safetensors')
    with torch.no_grad():
        error = (net(io['x'], io['sigma'], io['class_labels'], io['augment_labels']) - io['D']).abs().amax([1, 2, 3])
    assert (error <= 2e-5 * io['sigma'].clamp(min=1)).all()


@pytest.mark.parametrize('options', [{}, {'protocol': 3, 'old_torch': True}, {'protocol': 4, 'old_torch': True}])
@pytest.mark.parametrize('precond', ['edm', 'vp', 've', 'iddpm'])
def test_its_source_does_not_run(write, tmp_path, precond, options):
    marker = tmp_path / 'marker'
    net = build(precond=precond, **({'M': 50} if precond == 'iddpm' else {}))
    data = edm_pickle.snapshot(net, marker, **options)
    name, arguments, state = legacy_pickle.read_network(write(data))
    assert not marker.exists()
    assert (name, arguments) == (type(net).__name__, net.config)
    assert list(state) == list(net.state_dict()) and all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    if options == {}:
        edm_pickle.trusting_load(data)
        assert marker.read_text() == 'ran'  # so the source was live


def test_numbers_of_old_and_new_numpy(write):
    net = edm_pickle.EDMPrecond()
    net.config['sigma_data'] = np.float64(0.3)
    data = edm_pickle.snapshot(net, 'marker', protocol=3, old_torch=True)
    spellings = [data.replace(b'numpy._core.', b'numpy.core.'), data.replace(b'numpy.core.', b'numpy._core.')]
    assert spellings[0] != spellings[1]
    for found in spellings:
        assert legacy_pickle.read_network(write(found))[1] == {**net.config, 'sigma_data': 0.3}


def test_half_and_shared_storages(write):
    net = edm_pickle.EDMPrecond()
    net.model['a'].half()
    net.model['b'] = net.model['a']  # tied: one record, met twice
    state = legacy_pickle.read_network(write(edm_pickle.snapshot(net, 'marker')))[2]
    assert state['model.b.weight'].dtype == torch.float16 and torch.equal(state['model.a.weight'], state['model.b.weight'])


# --- EDM2's

@pytest.mark.parametrize('name', ['nosrc_tiny_edm2_latent_cond', 'nosrc_tiny_edm2_pixel_uncond_oldlayout'])
def test_published_snapshots_of_edm2(name):
    found, expected = legacy_pickle.read_snapshot(EDM2 / f'{name}.pkl'), json.loads((EDM2 / f'{name}.json').read_text())
    assert found[:2] == ('Precond', expected['init_kwargs']) and list(found.state) == list(expected['state_dict'])
    for key, value in found.state.items():
        wanted = expected['state_dict'][key]
        assert list(value.shape) == wanted['shape'] and value.dtype == torch.float16 == getattr(torch, wanted['dtype'])
        assert value.flatten()[:4].tolist() == wanted['first4'] and float(value.double().sum()) == pytest.approx(wanted['sum'], abs=1e-4)
    encoders = safetensors.torch.load_file(GOLDEN / 'encoders' / 'encoders.safetensors')
    constants = {key: encoders[f'vae.{key}'].tolist() for key in ('scale', 'bias')}
    assert found.encoder == {'class_name': 'StabilityVAEEncoder', 'vae_name': 'stabilityai/sd-vae-ft-mse', 'batch_size': 8, **constants}
    network = legacy_pickle.read_network(EDM2 / f'{name}.pkl')
    assert network[:2] == found[:2] and all(torch.equal(network[2][key], value) for key, value in found.state.items())


@pytest.mark.parametrize('old_torch', [False, True])
def test_the_source_of_edm2_does_not_run(write, tmp_path, old_torch):
    marker, net = tmp_path / 'marker', edm_pickle.UNet()
    data = edm_pickle.edm2_snapshot(net, {'img_resolution': 8, 'clip_act': None}, marker, old_torch=old_torch)
    found = legacy_pickle.read_snapshot(write(data))
    assert found.arguments == {'img_resolution': 8, 'clip_act': None} and not marker.exists()
    assert torch.equal(found.state['unet.enc.8x8_conv.weight'], net.enc['8x8_conv'].weight.half())
    assert torch.equal(found.state['unet.out_gain'], net.out_gain.half()) and found.state['unet.out_gain'].ndim == 0
    edm_pickle.trusting_load(data)
    assert marker.read_text() == 'ran'


@pytest.mark.parametrize('encoder, expected', [
    (None, {'class_name': 'StandardRGBEncoder'}),
    ({'n': 3, 'hidden': True, 'of': [np.float64(0.5), (None, 'x')], '_vae': edm_pickle.Persistent('AutoencoderKL', weights=b'x')},
     {'class_name': 'StabilityVAEEncoder', 'n': 3, 'hidden': True, 'of': [0.5, [None, 'x']]}),
    ({'class_name': 'other', 'a': np.arange(4, dtype='>i2').reshape(2, 2).T, 'b': np.float16([0.5])},
     {'class_name': 'StabilityVAEEncoder', 'a': [[0, 2], [1, 3]], 'b': [0.5]}),
])
def test_descriptions_of_encoders(write, encoder, expected):
    assert legacy_pickle.read_snapshot(write(edm_pickle.edm2_snapshot(edm_pickle.UNet(), {}, 'marker', encoder))).encoder == expected


def test_snapshots_without_an_encoder(write):
    assert legacy_pickle.read_snapshot(DATA / 'network-snapshot.pkl').encoder is None
    assert legacy_pickle.read_snapshot(write(edm_pickle.edm2_snapshot(edm_pickle.UNet(), {}, 'marker', encoder=None))).arguments == {}
    data = edm_pickle.dumped({'ema': edm_pickle.EDMPrecond(), 'encoder': None}, 'marker')
    assert legacy_pickle.read_snapshot(write(data)).encoder is None


# --- what is refused

def doubled():
    value = []
    for _ in range(40):
        value = [value, value]
    return value


def nested():
    value = EasyDict()
    for _ in range(200):
        value = EasyDict(a=value)
    return value


def recursive():
    value = EasyDict(a=1)
    value['a'] = value
    return value


@pytest.mark.parametrize('make, words', [
    (nested, 'levels deep'), (recursive, 'levels deep'), (doubled, 'steps'), (lambda: np.zeros(1_100_000, np.int8), 'steps'),
    (lambda: [np.zeros(100_000, np.int8)] * 20, 'steps'), (lambda: np.array(['a']), 'other than numbers'),
    (lambda: np.zeros(2, complex), 'other than numbers'), (lambda: np.zeros(0, np.float32), 'does not match'),
    (lambda: b'x', 'not a plain value'), (torch.nn.ModuleDict, 'not a plain value'), (edm_pickle.Linear, 'not a plain value'),
    (lambda: torch.nn.Parameter(torch.ones(2)), 'not a plain value'),
])
def test_encoders_that_are_refused(refused, make, words):
    start = time.monotonic()
    assert words in refused(edm_pickle.edm2_snapshot(edm_pickle.UNet(), {}, 'marker', encoder={'scale': make()}))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize('encoder', [[], {'class_name': 'x'}, 'x', 3, EasyDict(), np.ones(2, np.float32)])
def test_encoders_of_other_kinds(refused, encoder):
    assert 'encoder of an unknown form' in refused(edm_pickle.edm2_snapshot(edm_pickle.UNet(), {}, 'marker', whole={'encoder': encoder}))


def test_arrays_that_claim_too_much(refused):
    """The shape (4,) of an encoder's constants, overwritten by others."""
    data = edm_pickle.edm2_snapshot(edm_pickle.UNet(), {}, 'marker')
    old = pickle.MARK + pickle.BININT1 + b'\x01' + pickle.BININT1 + b'\x04' + pickle.TUPLE1
    assert data.count(old) == 2
    for number in (pickle.BININT + b'\xff\xff\xff\x7f', pickle.LONG1 + b'\x08' + b'\xff' * 7 + b'\x7f', pickle.BININT1 + b'\0',
                   pickle.BININT + b'\xff' * 4, pickle.NEWTRUE, pickle.BINFLOAT + struct.pack('>d', 4.0), pickle.EMPTY_TUPLE):
        changed = data.replace(old, old[:3] + number + pickle.TUPLE1, 1)
        assert 'does not match' in refused(without_frames(changed)), number


def without_frames(data):
    """A pickle of one frame without it, so that its length need not be right."""
    assert data[2:3] == pickle.FRAME
    return data[:2] + data[11:]


def test_dicts_that_are_called_with_arguments(refused):
    data = without_frames(edm_pickle.edm2_snapshot(edm_pickle.UNet(), {}, 'marker'))
    assert data.count(pickle.EMPTY_TUPLE + pickle.NEWOBJ) == 3
    made = data.replace(pickle.EMPTY_TUPLE + pickle.NEWOBJ, pickle.NONE + pickle.TUPLE1 + pickle.NEWOBJ, 1)
    assert 'unexpected arguments' in refused(made)


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('module, name', [('os', 'system'), ('posix', 'system'), ('builtins', 'eval'), ('builtins', 'exec'),
                                          ('builtins', 'getattr'), ('torch', 'load'), ('numpy', 'load'), ('collections', 'Counter'),
                                          ('torch.storage', 'os.system'), ('torch', 'FloatStorage'), ('un known', '\x1b[31m')])
def test_globals_are_refused_by_name(refused, module, name, protocol):
    assert f'asks for {ascii(f"{module}.{name}")[1:-1]}, which is not allowed' in refused(edm_pickle.ask_for(module, name, protocol))


def test_real_payloads_are_refused(refused, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    for protocol in range(6):
        message = refused(pickle.dumps({'ema': Payload()}, protocol))
        assert 'asks for' in message and 'mkdir' in message or 'opcode' in message or 'newer protocol' in message
    net = edm_pickle.EDMPrecond()
    assert 'mkdir' in refused(edm_pickle.snapshot(net, 'marker', loss_fn=Payload()))
    net.config['img_channels'] = Payload()
    assert 'mkdir' in refused(edm_pickle.snapshot(net, 'marker'))
    for changes in ({'encoder': Payload()}, {'dataset_kwargs': EasyDict(path=Payload())}, {'loss_fn': Payload()}, {'extra': [Payload()]}):
        assert 'mkdir' in refused(edm_pickle.dumped(EasyDict(ema=edm_pickle.EDMPrecond(), **changes), 'marker'))
    assert 'mkdir' in refused(edm_pickle.edm2_snapshot(edm_pickle.UNet(), {}, 'marker', {'_vae': Payload()}))
    assert 'mkdir' in refused(edm_pickle.edm2_snapshot(edm_pickle.UNet(), {}, 'marker', {'scale': np.array([Payload()])}))
    assert not (tmp_path / 'executed').exists()


def test_globals_inside_a_storage_are_refused(refused):
    data = edm_pickle.snapshot(edm_pickle.EDMPrecond(), 'marker')
    assert 'asks for torch.BloatStorage' in refused(data.replace(b'ctorch\nFloatStorage', b'ctorch\nBloatStorage'))


@pytest.mark.parametrize('key, old, new, words', [
    ('version', b'K\x06', b'K\x07', 'version 7 where 6 is read'),
    ('type', b'\x8c\x05class', b'\x8c\x05klass', "type 'klass' where 'class'"),
])
def test_other_versions_and_types(refused, key, old, new, words):
    data = edm_pickle.snapshot(edm_pickle.EDMPrecond(), 'marker')
    place = data.index(key.encode())
    assert words in refused(data[:place] + data[place:].replace(old, new, 1))


@pytest.mark.parametrize('old, new', [
    (struct.pack('<q', 16), struct.pack('<q', 2 ** 60)),  # the count of the values
    (b'K\x04K\x04\x86', b'K\xffK\xff\x86'),               # the shape
    (b'K\x04K\x01\x86', b'K\x01K\x04\x86'),               # the strides: transposed
    (b'K\x04K\x01\x86', b'K\x00K\x00\x86'),               # the strides: one value, repeated
    (b'K\x00K\x04K\x04', b'K\x01K\x04K\x04'),             # the offset
])
def test_sizes_that_the_file_cannot_hold(refused, old, new):
    data = edm_pickle.snapshot(edm_pickle.EDMPrecond(), 'marker')
    assert old in data
    refused(data.replace(old, new, 1))


def test_one_storage_cannot_be_asked_for_again_and_again(refused):
    net = edm_pickle.EDMPrecond()
    for i in range(2000):
        net.model[f'b{i}'] = net.model['a']
    assert 'larger than the file' in refused(edm_pickle.snapshot(net, 'marker'))


def test_a_file_cut_at_any_place(refused):
    data = edm_pickle.snapshot(edm_pickle.EDMPrecond(), 'marker')
    for size in range(0, len(data), 7):
        assert 'is empty' in refused(data[:size]) if not size else 'cut off' in refused(data[:size])


def test_other_files(refused):
    assert 'no network under the name "ema"' in refused(pickle.dumps({'G': 1}, 4))
    assert 'no network under the name "ema"' in refused(pickle.dumps([], 4))
    refused(b'\x00' * 1000)
    refused(b'PK\x03\x04' + bytes(100))
    refused(b'<!DOCTYPE html>')
    with pytest.raises(FileNotFoundError):
        legacy_pickle.read_network('nowhere.pkl')


@pytest.mark.parametrize('name', edm_pickle.bombs())
def test_bombs(refused, name):
    start = time.monotonic()
    refused(edm_pickle.bombs()[name])
    assert time.monotonic() - start < 20


def test_arguments_and_modules_that_refer_to_themselves(refused):
    doubled = []
    for _ in range(40):
        doubled = [doubled, doubled]
    net = edm_pickle.EDMPrecond()
    net.config['channel_mult'] = doubled
    assert 'steps' in refused(edm_pickle.snapshot(net, 'marker'))
    deep = []
    for _ in range(200):
        deep = [deep]
    net.config['channel_mult'] = deep
    assert 'levels deep' in refused(edm_pickle.snapshot(net, 'marker'))
    net = edm_pickle.EDMPrecond()
    net.model = torch.nn.ModuleDict()
    for _ in range(40):
        net.model = torch.nn.ModuleDict({'a': net.model, 'b': net.model})
    assert 'of text' in refused(edm_pickle.snapshot(net, 'marker'))
    net.model['a'] = net.model
    assert 'levels deep' in refused(edm_pickle.snapshot(net, 'marker'))


# --- what chance makes of a file

FUZZ = '''
import resource, signal, sys
import numpy as np
from dnnlib import UserError
from tests.support import edm_pickle
from torch_utils import legacy_pickle
from training.checkpoints.load import load_network
path, count, seed, loads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == 'network'
read = load_network if loads else legacy_pickle.read_network
base = open(path, 'rb').read()
draws = np.random.default_rng(seed)
read(path)  # whatever is imported late is in by now

FORBIDDEN = ('exec', 'compile', 'import', 'os.system', 'os.exec', 'os.mkdir', 'subprocess.Popen', 'pickle.find_class', 'socket.connect')
def forbid(event, args):
    if event in FORBIDDEN:
        raise SystemExit(f'{event} {args}')
sys.addaudithook(forbid)
used = int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 30,) * 2)

evil = [edm_pickle.ask_for(*name, protocol)[2:-1] for name in (('os', 'mkdir'), ('builtins', 'eval')) for protocol in (3, 4)]
evil += [data[2:] for data in edm_pickle.bombs().values() if len(data) < 2000]
kept = 0
for index in range(count):
    data = bytearray(base)
    for _ in range(draws.integers(1, 4)):
        place, kind = int(draws.integers(len(data))), draws.integers(6)
        if kind == 0:
            data[place] ^= 1 << int(draws.integers(8))
        elif kind == 1:
            del data[place:]
            data += b'.' * int(draws.integers(2))
        elif kind == 2:
            data[place:place] = bytes(draws.integers(0, 256, int(draws.integers(1, 6)), np.uint8))
        elif kind == 3:
            other, size = int(draws.integers(len(data))), int(draws.integers(1, 200))
            data[place:place] = data[other:other + size]
        elif kind == 4:
            data[place:place] = evil[int(draws.integers(len(evil)))]
        else:
            data[place:place + 4] = bytes([255] * 4)
        if not data:
            data += b'.'
    with open(path, 'wb') as f:
        f.write(data)
    signal.alarm(10)
    try:
        read(path)
        kept += 1
    except UserError as err:
        assert chr(10) not in err.message, err.message
    signal.alarm(0)
print(kept)
'''


def fuzz(path, count, seed, what, seconds):
    """Reads `count` mutations of a file in a process that may take 1 GiB more; returns how many of them were read all the same."""
    root = ROOT
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(root), str(root / 'tests')]), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', FUZZ, path, str(count), str(seed), what], capture_output=True, text=True, env=env,
                          cwd=root, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


needs_linux = pytest.mark.skipif(sys.platform != 'linux', reason='the limit on memory is set in the way of Linux')


@needs_linux
@pytest.mark.parametrize('count', [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('make', [lambda marker: edm_pickle.snapshot(edm_pickle.EDMPrecond(), marker),
                                  lambda marker: edm_pickle.edm2_snapshot(edm_pickle.UNet(), {'img_resolution': 8}, marker)])
def test_mutated_files(write, tmp_path, make, count):
    path = write(make(tmp_path / 'marker'))
    kept = fuzz(path, count, count, 'pickle', 300)
    assert count / 100 < kept < count / 2  # flipped weights and text do no harm; most else does
    assert not (tmp_path / 'marker').exists()


@needs_linux
@pytest.mark.slow
def test_mutated_networks(write, tmp_path):
    path = write(edm_pickle.snapshot(build(), tmp_path / 'marker'))
    assert fuzz(path, 10_000, 1, 'network', 1200) > 100
    assert not (tmp_path / 'marker').exists()
