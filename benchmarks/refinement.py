# SPDX-License-Identifier: Apache-2.0
"""Does refinement help? Rounds of refine.py against plain ambient training continued for as many images, from the same networks.

python benchmarks/refinement.py --scale=digits --out=runs/refinement-digits
python benchmarks/refinement.py --scale=cifar8 --data=cifar10-train-jpeg.zip --out=runs/refinement-cifar8

Networks are trained where --cells does not name the folder of benchmarks/price.py, whose finished cells are used then. Whatever is
finished is not done again. Prints paired tables, and writes OUT/results.json (docs/refinement.md)."""

import importlib.util
import math
import statistics
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.price import SCALES  # noqa: E402 (the folder above had to be found first)
from benchmarks.processes import SMALL, call, snapshot  # noqa: E402
from dnnlib import UserError  # noqa: E402
from dnnlib.files import read_json, write_json  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402

ARMS = {'ode': ['--sampler=heun'], 'sde': ['--sampler=dpmpp_2m_sde'], 'dataloops': ['--sampler=heun', '--schedule=dataloops']}
CONTINUED, SAMPLE_STEPS = 'continued', 9  # steps of the images of proximal FID
SAMPLING = dict(steps=12, sigma_min=0.02, sigma_max=20.0)  # of the images that are measured, as in benchmarks/price.py
ANNEALED = ['--lr=2e-3', '--lr-schedule=cosine', '--lr-rampup=0']  # of every round, and of the continued training


def script(name, *args):
    """Runs one of the scripts, which prints to the console."""
    call((name, [*map(str, args)]), show=True)


def prepare(out, scale, data):
    """Makes train.zip, reference.zip and their pixel statistics."""
    source = SCALES[scale].source or data
    if source is None:
        raise UserError(f'--scale={scale}: name its photographs with --data')
    for name, options in (('train.zip', SCALES[scale].train), ('reference.zip', SCALES[scale].reference)):
        if not (out / name).exists():
            script('dataset_tool', f'--source={source}', f'--dest={out / name}', *options.split())
    if not (out / 'reference-pixels.npz').exists():
        script('eval_fid', 'ref', f'--data={out / "reference.zip"}', f'--dest={out / "reference-pixels.npz"}', '--detector=pixels')


def trained(cells, own, scale, mimg, name, sigma, share, seed):
    """The network of a cell: "noisy-0.4-s0" or "mix-0.4-0.1-s0"; trained here if it is not there. own: whether the folder is ours."""
    folder = cells / 'runs' / name
    if not own and not (folder / 'cell.json').exists():
        raise UserError(f'--cells={cells}: the cell {name} is not finished there')
    if own and not (folder / 'done').exists():
        script('train', f'--data={cells / "train.zip"}', f'--outdir={folder}', '--nosubdir', '--resume=latest',
               *SCALES[scale].network.split(), f'--seed={seed}', f'--sigma={sigma}', f'--corruption-probability={1 - share:g}',
               f'--corruption-seed={seed}', f'--duration={mimg}', '--tick=8', '--snap=1000000', '--dump=2', '--samples=0', '--threads=1')
        (folder / 'done').touch()
    return Path(snapshot(folder))


def run_arm(folder, arm, base, o):
    """Trains an arm from the base network; returns the networks of its rounds, and the chosen one."""
    if arm == CONTINUED:
        if not (folder / 'done').exists():
            script('train', f'--config={base.parent / "options.json"}', f'--transfer={base}', f'--outdir={folder / "run"}', '--nosubdir',
                   '--resume=latest', f'--duration={o.rounds * o.duration:g}', f'--seed={1000 + o.seed}', '--snap=1000000', *ANNEALED)
            (folder / 'done').touch()
        return {'last': Path(snapshot(folder / 'run'))}
    if not (folder / 'done').exists():
        script('refine', 'rounds', f'--network={base}', f'--outdir={folder / "loop"}', f'--rounds={o.rounds}', f'--duration={o.duration:g}',
               *ARMS[arm], f'--steps={o.steps}', f'--seed={o.seed}', '--detector=pixels', f'--sample-steps={SAMPLE_STEPS}', '--batch=256',
               '--threads=1', '--', '--snap=1000000', *ANNEALED)
        (folder / 'done').touch()
    found = read_json(folder / 'loop' / 'rounds.json')
    networks = [folder / 'loop' / entry['network'] for entry in found['rounds']]
    return {'last': networks[-1], 'chosen': networks[found['chosen']],
            'proximal': [entry['proximal']['fid_score'] for entry in found['rounds']], 'number': found['chosen']}


class Ruler:
    """Distances of networks to the reference half, by each detector; each network is measured once."""

    def __init__(self, out, cells, samples):
        from metrics.detectors import module_detector, pixel_detector
        from metrics.statistics import load_statistics
        self.out, self.count = out, samples
        self.sides = {'pixels': (pixel_detector('cpu'), load_statistics(cells / 'reference-pixels.npz', detector='pixels'))}
        if (cells / 'small.safetensors').exists() and importlib.util.find_spec('benchmarks.small_detector'):
            self.sides['small'] = (module_detector('cpu', SMALL, str(cells / 'small.safetensors')),
                                   load_statistics(cells / 'reference-small.npz', detector='module'))

    def __call__(self, network, sigma):
        """{full | truncated: {detector: distance}}."""
        from metrics.evaluate import evaluate_batches
        from training.checkpoints.load import load_network
        from training.sampling import pieces
        from training.sampling.generate import generate_images
        from training.sampling.pixels import to_uint8
        path = self.out / 'distances' / f'{str(network.resolve()).strip("/").replace("/", "--")}.json'
        if path.exists():
            return read_json(path)
        net, found = load_network(network), {}
        for name, stop in (('full', None), ('truncated', sigma)):
            made = pieces.sampler_pieces(net, stop_sigma=stop, **SAMPLING)
            images = [to_uint8(part.images) for part in generate_images(net, range(self.count), batch=256, **made)]
            found[name] = {key: next(iter(evaluate_batches(images, *side).values())) for key, side in self.sides.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        return found


def summarise(results):
    """Markdown tables: mean distances by arm, and differences to the continued training, paired by seed."""
    lines = []
    for start in dict.fromkeys(r['start'] for r in results):
        for mode in ('full', 'truncated'):
            for detector in results[0]['distances']['last']['full']:
                of = {(r['arm'], r['seed']): {key: d[mode][detector] for key, d in r['distances'].items()}
                      for r in results if r['start'] == start}
                lines += table(f'{start}, {mode} sampling, {detector}', of)
    return '\n'.join(lines)


def table(title, of):
    """Lines of one table. of: {(arm, seed): {base | last | chosen: distance}}."""
    lines = [f'\n{title}\n', '| arm | seeds | before | last round | chosen round | last, less continued | chosen, less continued |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for arm in dict.fromkeys(arm for arm, _ in of):
        rows = {seed: d for (a, seed), d in of.items() if a == arm}
        paired = [seed for seed in rows if (CONTINUED, seed) in of]
        cells = [mean([d[key] for d in rows.values() if key in d]) for key in ('base', 'last', 'chosen')]
        less = [mean([rows[seed][key] - of[CONTINUED, seed]['last'] for seed in paired if key in rows[seed]], signed=True)
                for key in ('last', 'chosen')]
        lines.append(f'| {arm} | {len(rows)} | ' + ' | '.join([*cells, *(less if arm != CONTINUED else ['', ''])]) + ' |')
    return lines


def mean(values, signed=False):
    """"1.23 +- 0.04": mean and standard error."""
    if not values:
        return ''
    told = f'{statistics.mean(values):{"+" if signed else ""}.3f}'
    return told + (f' +- {statistics.stdev(values) / math.sqrt(len(values)):.3f}' if len(values) > 1 else '')


class Options:
    """What all arms of a start share."""

    def __init__(self, rounds, duration, steps, seed):
        self.rounds, self.duration, self.steps, self.seed = rounds, duration, steps, seed


@click.command(cls=Command)
@click.option('--scale', type=click.Choice(['digits', 'cifar8']), default='digits', show_default=True, help='Images and network')
@click.option('--out', 'outdir', metavar='DIR', required=True, help='Folder for everything that is written; the same command resumes')
@click.option('--data', metavar='PATH', help='Photographs, for scales other than digits')
@click.option('--cells', metavar='DIR', help='Folder of benchmarks/price.py with data, networks, detectors  [default: OUT, trained here]')
@click.option('--sigma', metavar='FLOAT', type=float, default=0.4, show_default=True, help='Noise level of the noisy images')
@click.option('--share', metavar='FLOAT', type=float, default=0.0, show_default=True, help='Share of clean images')
@click.option('--seeds', metavar='INT', type=int, default=3, show_default=True, help='Number of seeds')
@click.option('--arms', metavar='LIST', default=','.join([CONTINUED, *ARMS]), show_default=True, help='What is compared')
@click.option('--rounds', metavar='INT', type=int, default=3, show_default=True, help='Rounds of refinement')
@click.option('--duration', metavar='MIMG', type=float, default=0.012, show_default=True, help='Training length of a round')
@click.option('--steps', metavar='INT', type=int, default=12, show_default=True, help='Steps of restoring')
@click.option('--mimg', metavar='MIMG', type=float, default=0.064, show_default=True, help='Training length of the networks')
@click.option('--samples', metavar='INT', type=int, default=2000, show_default=True, help='Images of each network that are measured')
@version_option
def main(outdir, scale, data, cells, sigma, share, seeds, arms, rounds, duration, steps, mimg, samples):
    """Compare refinement with plain training continued for as many images."""
    out = Path(outdir).absolute()
    out.mkdir(parents=True, exist_ok=True)
    if cells is None:
        prepare(out, scale, data)
    own, cells = cells is None, Path(cells).absolute() if cells else out
    ruler = Ruler(out, cells, samples)
    for seed in range(seeds):
        start = f'mix-{sigma:g}-{share:g}' if share else f'noisy-{sigma:g}'
        base = trained(cells, own, scale, mimg, f'{start}-s{seed}', sigma, share, seed)
        for arm in arms.split(','):
            folder = out / 'arms' / f'{start}-s{seed}-{rounds}x{duration:g}-{arm}'
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / 'result.json').exists():
                networks = run_arm(folder, arm, base, Options(rounds, duration, steps, seed))
                told = {key: networks.pop(key) for key in ('proximal', 'number') if key in networks}
                distances = {'base': ruler(base, sigma), **{key: ruler(path, sigma) for key, path in networks.items()}}
                write_json(folder / 'result.json', {'start': f'{start}, {rounds} x {duration:g} Mimg', 'seed': seed, 'arm': arm, **told,
                                                    'distances': distances})
    results = [read_json(path) for path in sorted(out.glob('arms/*/result.json'))]
    write_json(out / 'results.json', {'results': results})
    print(summarise(results))


if __name__ == '__main__':
    main()
