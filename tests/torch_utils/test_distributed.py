# SPDX-License-Identifier: Apache-2.0
"""Ranks that exchange values, wait for each other, and notice when one is gone."""

import collections
import json
import os
import re
import socket
import threading
import time
from datetime import timedelta

import click
import pytest
import torch
from click.testing import CliRunner
from torch.distributed import TCPStore

from dnnlib import EasyDict, UserError
from tests.support import ROOT, launch, tiny
from torch_utils import command_line, distributed, monitor, packing, rendezvous

# --- values


def nested():
    """A value of every kind that training states hold, made anew at each call."""
    torch_range = lambda *shape, dtype=torch.float32: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    twice = torch_range(3)
    return {
        'json': [None, True, 2**70, -0.0, 'text', [], {}], 'tuple': (1, (2,)), 7: 'a key that is a number',
        'float': torch_range(2, 3),
        'half': torch_range(5, dtype=torch.bfloat16), 'count': torch_range(4, dtype=torch.int64) - 2,
        'mask': torch.tensor([True, False]), 'exact': torch_range(2, 2, dtype=torch.float64) / 3,
        'bytes': torch_range(9, dtype=torch.uint8),
        'complex': torch.tensor([1 + 2j]), 'scalar': torch.tensor(0.1), 'truth': torch.tensor(True), 'empty': torch.zeros(0, 3),
        'transposed': torch_range(3, 4).t(), 'part': torch_range(10)[1::3], 'expanded': torch.ones(1).expand(4),
        'parameter': torch.nn.Parameter(torch_range(2)), 'twice': [twice, {'again': twice}],
        'ordered': collections.OrderedDict(b=torch_range(1), a=EasyDict(x=1))}


def same(a, b):
    """Equal in types, keys, order and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.detach(), b.detach())
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b and repr(a) == repr(b)


def test_packing_keeps_structure_and_bytes():
    value = nested()
    data, tensors = packing.pack(value)
    assert b'torch.storage' not in data and len(data) < 2000  # structure alone
    found, empty = packing.unpack(data)
    assert len(empty) == len(tensors) == 16
    for fresh, tensor in zip(empty, tensors):
        fresh.fill_(0)
        for ours, theirs in zip(packing.pieces(fresh, 5), packing.pieces(tensor.contiguous(), 5), strict=True):
            ours.copy_(theirs)
    assert same(found, {**value, 'parameter': value['parameter'].detach()})
    assert found['twice'][0] is found['twice'][1]['again'] and not found['parameter'].requires_grad


EXCHANGE = '''
import json, os, sys, time
import torch
from torch_utils import distributed
os.environ.pop('TORCHELASTIC_RUN_ID')   # as srun starts them
os.environ.pop('LOCAL_WORLD_SIZE')
distributed.init()
sys.path.insert(0, sys.argv[1])
from tests.torch_utils.test_distributed import nested, same
from dnnlib import UserError
from torch_utils import rendezvous
distributed.PIECE_BYTES = 5   # so that tensors go in parts which no element fits
rank, size, found = distributed.rank(), distributed.size(), {}
last = size - 1
mine = nested() if rank == 0 else None
shared = distributed.share(mine)
found['shared'] = same(shared, nested()) and (shared is mine) == (rank == 0)
found['from the last'] = same(distributed.share({'t': torch.full([3], rank)}, source=last), {'t': torch.full([3], last)})
found['values'] = distributed.all_values({'rank': rank}) == [{'rank': other} for other in range(size)]
first, second = distributed.agree([rank, -rank, True]), distributed.agree([5])
found['agreed'] = second.result() == [5] and first.result() == [last, 0, 1] == first.result()
found['sum'] = distributed.all_sum(torch.tensor(rank)).item() == sum(range(size))

def fail():
    raise UserError('no such thing')

def leave(path):
    found['only rank 0'] = rank == 0
    raise FileNotFoundError(2, 'No such file', path)

def errors(function, *args):
    try:
        return function(*args)
    except (UserError, OSError) as err:
        return f'{type(err).__name__} {err}'

found['error of rank 0'] = errors(distributed.from_rank0, fail) == 'UserError no such thing'
found['file of rank 0'] = errors(distributed.from_rank0, leave, 'x') == "FileNotFoundError [Errno 2] No such file: 'x'"
found['error of a node'] = errors(distributed.first_on_node, fail) == 'UserError no such thing'
path = sys.argv[2] + '/fetched'
def fetch():
    there = os.path.exists(path)
    open(path, 'a').close()
    return there
found['first on the node'] = distributed.first_on_node(fetch) == (rank > 0)
found['local size'] = distributed.local_size() == size
rendezvous.REPORT_SEC, start = 0.2, time.time()
if rank == last:
    time.sleep(0.5)
distributed.wait_for_all('decoding')
found['waited'] = time.time() - start > 0.4
distributed.print0(distributed.rank_map())
with open(f'{sys.argv[2]}/{rank}.json', 'w') as file:
    json.dump(found, file)
distributed.shutdown()
'''


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_exchange_values(tmp_path, ranks):
    """Plain environment variables start the ranks, as a script of Slurm's sets them."""
    (tmp_path / 'ranks.py').write_text(EXCHANGE)
    done = launch.run(tmp_path / 'ranks.py', [ROOT, tmp_path], ranks)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        found = json.loads((tmp_path / f'{rank}.json').read_text())
        assert found.pop('only rank 0', rank == 0) == (rank == 0)
        assert len(found) == 11 and [name for name, good in found.items() if not good] == []
    waiting, where = dict.fromkeys(done.stdout.splitlines())
    host = socket.gethostname()
    assert waiting == f'waiting for rank {ranks - 1} ({host}): decoding'
    assert where == f'{ranks} ranks on 1 node: {host}: 0-{ranks - 1} (1 thread)'


def test_one_rank_needs_nobody():
    value = nested()
    assert distributed.share(value) is value and distributed.agree([3, True]).result() == [3, 1]
    assert distributed.from_rank0(divmod, 7, 3) == distributed.first_on_node(divmod, 7, 3) == (2, 1)
    distributed.wait_for_all('nobody')
    distributed.barrier()
    distributed.fail('text')
    distributed.end(3)
    assert distributed.rank_map() == '' and distributed.explain(RuntimeError('Connection closed by peer')) is None


def test_nodes_in_the_map(monkeypatch):
    peers = [rendezvous.Peer(host, 1, host, local, device, '', '')
             for host, devices in (('a', ['NVIDIA H200'] * 4), ('b', ['NVIDIA H100', 'NVIDIA H200']), ('c', ['2 threads']))
             for local, device in enumerate(devices)]
    monkeypatch.setattr(distributed, '_group', rendezvous.Group(None, None, None, None, peers, False))
    monkeypatch.setenv('WORLD_SIZE', '7')
    assert distributed.rank_map() == ('7 ranks on 3 nodes: a: 0-3 (NVIDIA H200), b: 4-5 (NVIDIA H100 / NVIDIA H200), c: 6 (2 threads)')


# --- how they meet

@pytest.fixture(scope='module')
def store():
    return TCPStore('127.0.0.1', 0, None, True, timedelta(seconds=60), wait_for_workers=False)


@pytest.fixture
def agent(monkeypatch, store):
    """A store that outlives the ranks, as torchrun's does; one connection serves all of them, for each new one may wait for a DNS."""
    for name, value in dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE='True').items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, 'connect', lambda host, port: store)
    return store


def meet(*ranks, size=None):
    """What each of the ranks, threads of this process, gets of the meeting: a Group or a UserError."""
    found = [None] * len(ranks)

    def work(place, rank):
        try:
            found[place] = rendezvous.meet(rank, size or len(ranks), f'device {rank}', rank)
        except UserError as err:
            found[place] = err

    threads = [threading.Thread(target=work, args=item) for item in enumerate(ranks)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return found


def test_each_start_has_a_name_of_its_own(agent):
    """Also where the store has the keys of earlier ones: one that was complete, and one of which rank 1 came alone."""
    names = []
    for size in (3, 2, 2, 4):
        groups = meet(*range(size))
        assert all(group.watch.check(['peers']) and group.peers == groups[0].peers and len(group.peers) == size for group in groups)
        assert [peer.device for peer in groups[0].peers] == [f'device {rank}' for rank in range(size)]
        names.append({group.prefixes for group in groups})
        assert not groups[0].store.check(['left by an earlier start'])
        groups[1].store.set('left by an earlier start', '')
        assert groups[0].connect().check(['left by an earlier start'])
        agent.set('ranks/asks/1', 'of a rank that came alone')
    assert [len(found) for found in names] == [1] * 4 and len(set.union(*names)) == 4


def test_ranks_that_do_not_come_are_named(agent, monkeypatch):
    monkeypatch.setattr(rendezvous, 'JOIN_SEC', 0.3)
    first, other = meet(0, 2, size=4)
    assert str(first).startswith('1, 3 of 4 ranks did not join within 0.3 s: start all of them')
    assert str(other) == 'the 4 ranks did not all join within 0.3 s; rank 0 prints which are missing'
    lone, = meet(1, size=2)
    assert 'rank 0 did not join within 0.3 s; rank 1 (host ' in str(lone)


def test_a_rank_that_was_given_twice(agent, monkeypatch):
    """One of the two is refused at least, and told why; or, where it came when the others had met, that nobody waits for it."""
    monkeypatch.setattr(rendezvous, 'JOIN_SEC', 5)
    refused = [str(each) for each in meet(0, 1, 1, size=2)[1:] if not isinstance(each, rendezvous.Group)]
    assert refused and all(re.match(r'RANK=1 was given twice: to this process \(host |rank 0 did not join within 5 s; rank 1 \(host ', each)
                           for each in refused)


def test_nobody_at_the_address(monkeypatch):
    monkeypatch.setattr(rendezvous, 'JOIN_SEC', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f'MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank 0 cannot listen there'):
            rendezvous.serve('127.0.0.1', port)
    with pytest.raises(UserError, match=rf'MASTER_PORT={port}: no answer within 0.2 s \(.*refused\); start rank 0 there'):
        rendezvous.reach('127.0.0.1', port)


@pytest.mark.parametrize('name', ['RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'])
def test_variables_that_are_missing(monkeypatch, name):
    for other in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(other, '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f'WORLD_SIZE=2 is set, but not {name}; start the ranks with torchrun, or set all of them'):
        distributed.init()


def test_ranks_are_numbered_node_by_node():
    peer = lambda node, local: rendezvous.Peer(node, 1, node, local, '', '', '')
    distributed._check_order([peer('a', 0), peer('a', 1), peer('b', 0)])
    for peers in ([peer('a', 0), peer('b', 0), peer('a', 1)], [peer('a', 1), peer('a', 0)], [peer('a', 0), peer('b', 1)]):
        with pytest.raises(UserError, match='number the ranks node by node'):
            distributed._check_order(peers)


def test_the_way_to_other_nodes():
    """Not the loopback, which a node's own name may stand for; None where all are on one node."""
    peer = lambda node, address: rendezvous.Peer(node, 1, node, 0, '', address, '')
    group = lambda *peers: rendezvous.Group(None, None, ('127.0.0.1', 1), None, list(peers), True)
    assert rendezvous.interface(group(peer('a', '127.0.0.1'), peer('a', '127.0.0.1')), 0) is None
    assert rendezvous.interface(group(peer('a', '127.0.0.1'), peer('b', '127.0.0.9')), 0) == 'lo'  # nothing better is known


@pytest.mark.parametrize('gpus, local, index', [(8, 3, 3), (1, 3, 0)])
def test_group_of_gpus(monkeypatch, gpus, local, index):
    """nccl for GPUs and gloo for the CPU, bound to the rank's GPU; srun --gpus-per-task=1 shows each rank its own alone."""
    told = {}
    peers = [rendezvous.Peer('a', 1, 'a', other, '', '', '') for other in range(8)]
    for name, value in dict(RANK=local, LOCAL_RANK=local, WORLD_SIZE=8, MASTER_ADDR='a', MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    for name, value in dict(is_available=True, device_count=gpus, get_device_name='GPU', set_device=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: told.update(kwargs, backend=args))
    monkeypatch.setattr(rendezvous, 'meet', lambda *args: rendezvous.Group('store', None, ('a', 1), (), peers, False))
    monkeypatch.setattr(distributed, 'Monitor', lambda group, judge, tell: told.update(limit=judge.limit))
    for name in ('_group', '_monitor', '_waits', '_words', '_launcher_pid'):
        monkeypatch.setattr(distributed, name, None)
    distributed.init(timeout=120)
    assert told == dict(backend=('cpu:gloo,cuda:nccl',), timeout=timedelta(minutes=2), device_id=torch.device('cuda', index),
                        store='store', rank=local, world_size=8, limit=90)


@pytest.mark.parametrize('launcher, orphan', [('torchrun', True), ('srun', False)])
def test_only_workers_of_torchrun_can_be_orphans(monkeypatch, launcher, orphan):
    """Slurm and mpirun end what they started; a shell that started ranks may end before them."""
    monkeypatch.setattr(distributed, '_launcher_pid', None)
    if launcher == 'torchrun':
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    distributed.init()
    assert not distributed.is_orphan()
    monkeypatch.setattr(os, 'getppid', lambda: 1)
    assert distributed.is_orphan() == orphan


# --- who is gone

PEERS = [rendezvous.Peer(host, 100 + rank, host, rank % 2, '', '', '') for rank, host in enumerate('aabb')]


def judge(rank=0, timeout=100, option=' (--timeout=2)'):
    return monitor.Judge(PEERS, rank, timeout, option, 'start again')


def beats(*values):
    return [value if isinstance(value, bytes) else str(value).encode() for value in values]


def test_silence_is_counted_from_the_last_sign():
    watch = judge()
    assert watch.interval == 5 and watch.limit == 75
    for beat in range(100):
        assert watch.hear(beats(0, beat, beat, min(beat, 10)), 5) is None or beat == 25
        if beat == 25:
            break
    said = watch.hear(beats(0, 30, 30, 10), 5)
    assert said == 'rank 3 (host b, pid 103) has not answered for 80 s (--timeout=2): stopping; start again'


def test_lost_ranks_are_told_of_together():
    watch = judge()
    watch.hear(beats(0, 0, 0, 0), 5)
    for _ in range(14):
        assert watch.hear(beats(0, 1, 0, 0), 5) is None
    assert watch.hear(beats(0, 1, 0, 0), 5) == (
        'rank 1 (host a, pid 101), rank 2 (host b, pid 102), rank 3 (host b, pid 103) have not answered for 75 s (--timeout=2): '
        'stopping; start again')


def test_who_has_ended_is_not_awaited():
    watch = judge()
    for beat in range(100):
        assert watch.hear(beats(0, beat, b'done', b'done'), 5) is None


def test_an_error_elsewhere_ends_this_rank_soon():
    watch, seconds = judge(), 0
    broken = beats(0, 0, b'failed UserError: no such file', 0)
    assert watch.hear(broken, 5) is None
    while (said := watch.hear(broken, 5)) is None:
        seconds += 5
    assert seconds < monitor.FAILED_SEC and said == 'rank 2 (host b, pid 102) has ended with an error (UserError: no such file): stopping'


def test_a_store_that_is_silent_and_comes_back():
    """Nobody could write a heartbeat in that time: it is nobody's silence."""
    watch = judge()
    watch.hear(beats(0, 1, 1, 1), 5)
    for _ in range(74):
        assert watch.miss(('a', 29500), 1) is None
    assert watch.hear(beats(0, 1, 1, 1), 74) is None and watch.hear(beats(0, 1, 1, 1), 5) is None
    assert watch.miss(('a', 29500), 74) is None
    assert watch.miss(('a', 29500), 1) == (
        'rank 0 (host a, pid 100): the store of the ranks, at a:29500, has not answered for 75 s (--timeout=2): this node is disconnected, '
        'or that one is down; stopping; start again')


def test_the_first_living_rank_of_a_node_speaks():
    watch = judge(rank=3)
    assert not watch.speaks()
    watch.hear(beats(0, 0, 0, 0), 5)
    for beat in range(3):
        watch.hear(beats(beat, beat, 0, 0), 5)
    assert watch.speaks()


def test_intervals_fit_the_timeout():
    assert [judge(timeout=timeout).interval for timeout in (6, 18, 120, 600, 36000)] == [0.5, 0.9, 6, 15, 15]


def test_signs_of_life_cost_next_to_nothing(agent, monkeypatch):
    """Processor time, at 200 beats a second: a training step of milliseconds cannot feel one a second."""
    monkeypatch.setattr(monitor, 'INTERVAL_SEC', (0.005, 0.005))
    group, = meet(0)
    for rank in range(1, 64):
        group.store.set(f'beat/{rank}', '0')
    peers = group.peers * 64
    watched = monitor.Monitor(group._replace(peers=peers), monitor.Judge(peers, 0, 600, '', ''), None)
    time.sleep(0.2)  # the connection
    before, used = int(group.store.get('beat/0')), time.process_time()
    time.sleep(0.5)
    used, count = time.process_time() - used, int(group.store.get('beat/0')) - before
    watched.leave()
    assert count > 20 and used / count < 5e-3
    assert group.store.get('beat/0') == b'done' and not watched.failed


def test_a_rank_leaves_word_of_its_error(agent):
    group, = meet(0)
    watched = monitor.Monitor(group, monitor.Judge(group.peers, 0, 600, '', ''), None)
    watched.leave('UserError: text')
    watched.leave()  # too late
    assert group.store.get('beat/0') == b'failed UserError: text' and watched.failed


STOPPED = '''
import os, signal, sys, time
import torch
from torch_utils import distributed, monitor
monitor.INTERVAL_SEC = 0.2, 15
distributed.init(timeout=3, remedy='start again')
distributed.on_abort(lambda text: open(sys.argv[1], 'w').write(text))
if distributed.rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
print(f'{time.time():.2f}', flush=True)
distributed.all_sum(torch.ones(1))
'''


def test_a_process_that_is_stopped(tmp_path):
    """The other one, in a collective operation, ends within the timeout, says why, and can write it down."""
    (tmp_path / 'ranks.py').write_text(STOPPED)
    done = launch.run(tmp_path / 'ranks.py', [tmp_path / 'note'], ranks=2)
    seconds = time.time() - float(done.stdout)
    assert done.returncode == 1 and seconds < 3 + 1.5, seconds  # the launcher takes some of it
    said, = done.stderr.splitlines()
    assert said == (tmp_path / 'note').read_text()
    assert said.startswith('rank 1 (host ') and said.endswith(' s (--timeout=0.05): stopping; start again')


# --- errors of collective operations

LATE = '''
import sys, time
import click, torch
from torch_utils import distributed, monitor
from torch_utils.command_line import Command
monitor.SHARE = 100   # leave it to the process group

@click.command(cls=Command)
def main():
    distributed.init(timeout=1)
    distributed.on_abort(lambda text: print('note:', text, flush=True))
    time.sleep(distributed.rank() * 100)
    distributed.all_sum(torch.ones(1))

main()
'''


def test_a_rank_that_never_comes_is_one_line(tmp_path):
    (tmp_path / 'ranks.py').write_text(LATE)
    done = launch.run(tmp_path / 'ranks.py', [], ranks=2)
    said, = done.stderr.splitlines()
    assert done.returncode == 1 and said.startswith('Error: rank 0 (host ')
    assert 'has lost the others (Timed out waiting 1000ms for recv operation to complete) (--timeout=0.0166667): stopping' in said
    assert done.stdout == f'note: {said.removeprefix("Error: ")}\n'


@pytest.fixture
def among_others(monkeypatch):
    monkeypatch.setattr(distributed, '_group', rendezvous.Group(None, None, None, None, PEERS, False))
    monkeypatch.setattr(distributed, '_words', (' (--timeout=2)', 'start again'))


@pytest.mark.parametrize('error, reason', [
    (RuntimeError('[/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:2345. This is typically'),
     'Connection closed by peer [10.0.0.2]:2345'),
    (RuntimeError('[pair.cc:538] Read error [10.0.0.2]:2345: Connection reset by peer'),
     'Read error [10.0.0.2]:2345: Connection reset by peer'),
    (torch.distributed.DistBackendError('NCCL error in: x.cpp:12, remote process exited\nframe #0: c10'),
     'NCCL error in: x.cpp:12, remote process exited'),
    (torch.distributed.DistNetworkError('failed to recv, got 0 bytes\n\nException raised from'), 'failed to recv, got 0 bytes'),
    (torch.distributed.DistStoreError('wait timeout after 1000ms, keys: /x'), 'wait timeout after 1000ms, keys: /x')])
def test_errors_of_lost_ranks(among_others, error, reason):
    assert distributed.explain(error) == f'rank 0 (host a, pid 100) has lost the others ({reason}): stopping; start again'


@pytest.mark.parametrize('error', [RuntimeError('CUDA out of memory'), ValueError('Connection closed by peer'), OSError('Broken pipe'),
                                   RuntimeError('mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)')])
def test_other_errors_stay_what_they_are(among_others, error):
    assert distributed.explain(error) is None


def test_lost_ranks_have_an_exit_code_of_their_own(among_others):
    @click.command(cls=command_line.Command)
    def script():
        raise RuntimeError('Connection closed by peer [::1]:5')

    result = CliRunner().invoke(script)
    assert (result.exit_code, monitor.EXIT_LOST) == (76, 76)
    assert result.output == ('Error: rank 0 (host a, pid 100) has lost the others (Connection closed by peer [::1]:5): '
                             'stopping; start again\n')


@pytest.mark.parametrize('minutes', ['0', '0.05', '-1', 'nan', 'inf', '20000', 'soon'])
def test_timeouts_that_are_none(minutes):
    with pytest.raises(UserError, match=f'"{minutes}" is not a number that is 0.1 or more and 10080 or less'):
        tiny.call('--outdir=none', '--data=none', f'--timeout={minutes}')
