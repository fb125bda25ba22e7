# SPDX-License-Identifier: Apache-2.0
"""Several nodes, and ranks that are lost: torchrun and plain processes in network namespaces, which are cut off, stopped, killed."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tests.support import ROOT, launch, nodes, tiny

MINUTES = 0.3  # of --timeout
ENV = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
LAUNCHERS = ('c10d', 'static', 'variables')
FULL = ['--seed=5', '--threads=1', '--duration=0.00064', '--nosubdir']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny.make_zip(tmp_path_factory.mktemp('data') / 'data.zip')


def command(launcher, number, *args, count=2, ranks=1, flags=()):
    """(command line, environment) of train.py on node `number` of `count`."""
    script = [ROOT / 'train.py', *args]
    if launcher == 'variables':  # what a script of Slurm's sets for each task
        told = dict(RANK=number, LOCAL_RANK=0, WORLD_SIZE=count, MASTER_ADDR='node0', MASTER_PORT=29500)
        return [sys.executable, *script], {**ENV, **{name: str(value) for name, value in told.items()}}
    meeting = ['--rdzv-backend=c10d', '--rdzv-endpoint=node0:29400', '--rdzv-id=run'] if launcher == 'c10d' else [
        f'--node-rank={number}', '--master-addr=node0', '--master-port=29500']
    return [sys.executable, '-m', 'torch.distributed.run', f'--nnodes={count}', f'--nproc-per-node={ranks}', *meeting, *flags, *script], ENV


class Job:
    """train.py on all nodes of a cluster."""

    def __init__(self, cluster, folder, launcher, *args, env=None, **how):
        self.nodes, self.folder, self.env = cluster, folder, env or {}
        self.commands = [command(launcher, number, *args, count=len(cluster), **how) for number in range(len(cluster))]
        self.started = [self.start(number) for number in range(len(cluster))]

    def start(self, number):
        line, env = self.commands[number]
        return self.nodes[number].start(line, self.path(number), {**env, **self.env})

    def path(self, number):
        return self.folder / f'log{number}'

    def log(self, number):
        return self.path(number).read_text()

    def logs(self):
        return '\n'.join(f'--- node {number}\n{self.log(number)}' for number in range(len(self.nodes)))

    def wait_for(self, text, seconds=120):
        """Until rank 0 has said it."""
        deadline = time.monotonic() + seconds
        while text not in self.log(0):
            assert time.monotonic() < deadline and self.started[0].poll() is None, self.logs()
            time.sleep(0.1)

    def codes(self, seconds=200):
        """Exit codes of what was started on the nodes."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.started]

    def ranks(self, number):
        """The processes of the node's ranks, by number."""
        found = {}
        for process in self.nodes[number].processes():
            line = ' '.join(process.cmdline())
            if 'train.py' in line and 'torch.distributed.run' not in line and process.status() != psutil.STATUS_ZOMBIE:
                found[int(process.environ()['RANK'])] = process
        return found


def seconds_until(condition, most):
    """How long that takes."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < most, f'not within {most} s'
        time.sleep(0.1)
    return time.monotonic() - start


# --- the nodes themselves

def reach(node, other):
    """Whether a connection from the node to the other's port 5000 succeeds within a second."""
    code = f'import socket; socket.create_connection(("{other.name}", 5000), 1)'
    return node.start([sys.executable, '-S', '-c', code], os.devnull).wait() == 0


def test_nodes_can_be_cut_off_and_healed(tmp_path):
    serve = 'import socket; s = socket.create_server(("", 5000)); print(socket.gethostname(), flush=True)\nwhile True: s.accept()'
    with nodes.cluster(3) as (a, b, c):
        b.start([sys.executable, '-S', '-c', serve], tmp_path / 'log')
        seconds_until(lambda: (tmp_path / 'log').read_text() == 'node1\n', 20)
        assert reach(a, b) and reach(c, b) and not reach(b, a)
        b.cut()
        assert not reach(a, b)
        b.heal()
        seconds_until(lambda: reach(a, b), 20)
        served, = b.processes()
        mine = a.space.rsplit('-', 1)[0]
        assert mine in subprocess.run(['ip', 'netns'], capture_output=True, text=True).stdout
    assert not psutil.pid_exists(served.pid) or served.status() == psutil.STATUS_ZOMBIE
    assert mine not in subprocess.run(['ip', 'netns'], capture_output=True, text=True).stdout


# --- training

@pytest.mark.slow
@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_two_nodes_train_as_one(tmp_path, data, launcher):
    """Bit for bit; and where each node takes its own name for the loopback, gloo finds the way to the other all the same."""
    tiny.finish([f'--outdir={tmp_path / "one"}', f'--data={data}', *tiny.FLAGS, *FULL], tmp_path / 'log', ranks=2)
    with nodes.cluster(2, own_loopback=True) as both:
        job = Job(both, tmp_path, launcher, f'--outdir={tmp_path / "two"}', f'--data={data}', *tiny.FLAGS, *FULL)
        assert job.codes() == [0, 0], job.logs()
    assert '2 ranks on 2 nodes: node0: 0 (1 thread), node1: 1 (1 thread)' in job.log(0)
    assert 'ranks on' not in job.log(1)
    one, two = (tiny.digests(tmp_path / name) for name in ('one', 'two'))
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_a_node_that_is_cut_off(tmp_path, data, launcher):
    """Its rank and the other one end within the timeout, and say why; the launcher of the node that has the store ends, too."""
    args = [f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, f'--timeout={MINUTES}', '--duration=10', '--nosubdir']
    with nodes.cluster(2) as both:
        job = Job(both, tmp_path, launcher, *args)
        job.wait_for('tick 3 ')
        both[1].cut()
        start = time.monotonic()
        for number in (0, 1):
            seconds_until(lambda number=number: not job.ranks(number), 60 * MINUTES + 1)
        assert time.monotonic() - start < 60 * MINUTES + 1, job.logs()
        # On the other node torchrun's c10d waits for its own connection to break, which takes TCP a quarter of an hour.
        ended = job.started[0] if launcher == 'c10d' else None
        codes = [ended.wait(30)] if ended else job.codes(30)
        assert codes == {'variables': [76, 76], 'static': [1, 1], 'c10d': [1]}[launcher]
    there = rf'rank 1 \(host node1, pid \d+\) has not answered for \d+ s \(--timeout={MINUTES}\): stopping; continue with the same command'
    assert len(re.findall(f'^{there} and --resume=latest$', job.log(0), re.MULTILINE)) == 1, job.log(0)
    here = r'rank 1 \(host node1, pid \d+\): the store of the ranks, at node0:\d+, has not answered for \d+ s .*: this node is disconnected'
    assert len(re.findall(f'^{here}', job.log(1), re.MULTILINE)) == 1, job.log(1)


@pytest.mark.slow
def test_an_error_on_one_node(tmp_path, data):
    """The other node, which nobody else would tell, learns what it was."""
    with nodes.cluster(2) as both:
        found = []
        for number, node in enumerate(both):
            own = ['--wandb=x'] if number else []  # whose package is not here
            line, env = command('variables', number, f'--outdir={tmp_path}', f'--data={data}', *tiny.FLAGS, *own)
            found.append(node.start(line, tmp_path / f'log{number}', env))
        assert [process.wait(120) for process in found] == [76, 1]
    logs = [(tmp_path / f'log{number}').read_text() for number in (0, 1)]
    said = r'^rank 1 \(host node1, pid \d+\) has ended with an error \(--wandb needs the package wandb: pip install wandb\): stopping$'
    assert re.search(said, logs[0], re.MULTILINE), logs[0]
    assert logs[1].count('Error: --wandb needs the package wandb') == 1 and 'Traceback' not in logs[0] + logs[1]


def page():
    """(the first block of docs/multi-node.md, [(command of node 0, of node 1), ...])."""
    text = (ROOT / 'docs' / 'multi-node.md').read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r'(?:^    .*\n)+', text, re.MULTILINE)]
    settings, = [block for block in blocks if block.startswith('RUN=')]
    found = []
    for block in blocks:
        each = re.split(r'^# on (?:each node|node[01])\n', block, flags=re.MULTILINE)[1:]
        if each:
            found.append((each[0], each[-1]))
    return settings, found


@pytest.mark.slow
@pytest.mark.parametrize('kind', range(3))
def test_commands_of_the_page(tmp_path, kind):
    settings, found = page()
    assert len(found) == 3
    tiny.make_zip(tmp_path / 'digits.zip', count=128)
    (tmp_path / 'train.py').symlink_to(ROOT / 'train.py')
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
    with nodes.cluster(2) as both:
        started = []
        for number, node in enumerate(both):
            line = ['sh', '-c', settings + found[kind][number]]
            started.append(node.start(line, tmp_path / f'log{number}', {**ENV, 'PATH': path}, cwd=tmp_path))
        codes = [process.wait(300) for process in started]
    logs = [(tmp_path / f'log{number}').read_text() for number in (0, 1)]
    assert codes == [0, 0] and 'Done: runs/00000-digits' in logs[0], logs


# --- ranks that stop, are slow, or are killed

def workers(process):
    """{rank: process} of a torchrun on this machine."""
    found = psutil.Process(process.pid).children(recursive=True)
    return {int(each.environ()['RANK']): each for each in found if any('train.py' in part for part in each.cmdline())}


@pytest.mark.slow
@pytest.mark.parametrize('stopped', [0, 1])
def test_a_rank_that_is_stopped(tmp_path, data, stopped):
    """The other one ends within the timeout; torchrun kills the stopped one 30 s later, and ends with an error."""
    log = tmp_path / 'log'
    args = [f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, f'--timeout={MINUTES}', '--duration=10']
    process = tiny.start(args, log, ranks=2, torchrun=True)
    try:
        seconds_until(lambda: 'tick 2 ' in log.read_text(), 120)
        ranks = workers(process)
        ranks[stopped].send_signal(signal.SIGSTOP)
        other = ranks[1 - stopped]
        seconds_until(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE, 60 * MINUTES + 1)
        assert f'rank {stopped} (host {os.uname().nodename}, pid {ranks[stopped].pid}) has not answered for 1' in log.read_text()
        assert process.wait(60) == 1 and 'exitcode  : 76' in log.read_text()
    finally:
        process.kill()


SLOW = '''
import os, sys, time
sys.path.insert(0, {root!r})
import train
from training.data.store import ImageStore
decode = ImageStore._decode

def slowly(self, rows, images):
    if os.environ['RANK'] == '1' and rows[0] < 64:
        time.sleep({seconds})
    decode(self, rows, images)

ImageStore._decode = slowly
train.main()
'''


@pytest.mark.slow
def test_decoding_may_take_longer_than_the_timeout(tmp_path):
    """6 s of timeout, 9 s of decoding on one rank."""
    data = tiny.make_zip(tmp_path / 'data.zip', count=128)
    (tmp_path / 'slow.py').write_text(SLOW.format(root=str(ROOT), seconds=9).replace('rows[0] < 64', 'rows[0] >= 64'))
    args = [f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, '--timeout=0.1', '--duration=0.0001', '--cache-gib=0']
    done = launch.run(tmp_path / 'slow.py', args, ranks=2)
    assert done.returncode == 0 and 'Done: ' in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('launcher, count', [('c10d', 1), ('c10d', 2), ('static', 2)])
def test_a_killed_rank_is_started_again(tmp_path, data, launcher, count):
    """torchrun --max-restarts with --resume=latest ends in the weights of a run that nobody killed."""
    flags = [f'--data={data}', *tiny.FLAGS, '--seed=5', '--threads=1', '--duration=0.0024', '--dump=1', '--nosubdir']
    tiny.finish([f'--outdir={tmp_path / "straight"}', *flags], tmp_path / 'log', ranks=2)
    with nodes.cluster(count) as cluster:
        job = Job(cluster, tmp_path, launcher, f'--outdir={tmp_path / "killed"}', *flags, '--resume=latest',
                  ranks=2 // count, flags=['--max-restarts=2'])
        job.wait_for('tick 4 ')
        job.ranks(count - 1)[1].kill()
        assert job.codes() == [0] * count, job.logs()
    assert job.log(0).count('Restored network') == 1, job.logs()
    last = 'training-state-000002.400.pt'
    straight, killed = (tiny.digests(tmp_path / name, last) for name in ('straight', 'killed'))
    assert straight == killed
    assert not [name for name in os.listdir(tmp_path / 'killed') if name.startswith('.')]


@pytest.mark.slow
def test_nodes_that_go_and_come(tmp_path, data):
    """torchrun --nnodes=1:2: one node goes on alone when the other is gone, and with it again when it is back."""
    args = [f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, '--duration=10', '--dump=1', '--nosubdir', '--resume=latest']
    with nodes.cluster(2) as (first, second):
        job = Job([first, second], tmp_path, 'c10d', *args, env={'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'},
                  flags=['--nnodes=1:2', '--max-restarts=3', '--rdzv-conf=last_call_timeout=5'])
        job.wait_for('tick 3 ')
        for process in second.processes():
            process.kill()
        job.wait_for('Restored network')
        assert job.log(0).count('2 ranks on 2 nodes') == 1
        job.started[1] = job.start(1)
        seconds_until(lambda: job.log(0).count('Restored network') == 2 and job.log(0).count('2 ranks on 2 nodes') == 2, 120)
        seconds_until(lambda: 'tick ' in job.log(0).rsplit('Restored network', 1)[1], 60)
