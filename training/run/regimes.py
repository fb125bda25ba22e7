# SPDX-License-Identifier: Apache-2.0
"""--regime: how to train, and how to go on, for data of which all, few or no images are clean, as measured in docs/choosing.md.

A regime is a row of REGIMES: which data it is for, how its snapshots are sampled unless told otherwise, and what to do after the run."""

import shlex
from typing import NamedTuple

from dnnlib import EasyDict, UserError
from torch_utils import distributed, registry
from training.data.dataset import Levels
from training.run.config import Config

AUTO = 'auto'


class Regime(NamedTuple):
    """what: which data it is for. truncated_below: share of clean images below which snapshots are sampled down to the lowest sigma_n only,
    as their "sampling" says. after: commands to go on with, as (what for, command), whose {network} is the last snapshot, {data} the --data
    of the run, {noise} the options of its noise, {half} and {tenth} a half and a tenth of its length in million images."""

    what: str
    truncated_below: float = 0.0
    after: tuple = ()


def fitting(levels: Levels) -> str:
    """The name of the regime for such data."""
    return 'all-clean' if levels.clean == levels.images else 'few-clean' if levels.clean else 'noisy-only'


def choose(o: EasyDict, levels: Levels) -> str | None:
    """The regime that --regime asks for; prints it. levels: Levels with the noise that the run adds. Raises UserError where the data is not
    of that kind."""
    if o.regime is None:
        return None
    name, words = fitting(levels), describe(levels)
    if o.regime not in (AUTO, name):
        raise UserError(f'--regime={o.regime} is for {REGIMES[o.regime].what}, and of --data={o.data} {words}; use --regime={name}')
    how = f'; snapshots are sampled down to sigma {levels.lowest:g}, the lowest sigma_n' if is_truncated(name, levels) else ''
    distributed.print0(f'Regime {name}: {words}{how} (docs/choosing.md)')
    return name


def describe(levels: Levels) -> str:
    """"500 of 5000 images are clean, the others have sigma_n 0.2"."""
    if levels.clean == levels.images:
        return f'all {levels.images} images are clean'
    span = f'{levels.lowest:g}' if levels.lowest == levels.highest else f'{levels.lowest:g} to {levels.highest:g}'
    who = 'the others have' if levels.clean else 'they have'
    return f'{levels.clean or "none"} of {levels.images} images {"is" if levels.clean < 2 else "are"} clean, {who} sigma_n {span}'


def is_truncated(name: str, levels: Levels) -> bool:
    """Whether a regime's snapshots are sampled down to the lowest sigma_n only."""
    return levels.clean < REGIMES[name].truncated_below * levels.images


def sampling(name: str | None, levels: Levels, own: dict | None) -> dict | None:
    """The "sampling" of config.json for a regime, from the network's own; None: EDM's."""
    if name is None or not is_truncated(name, levels):
        return own
    own = own or {'sampler': 'heun', 'steps': 18}
    sampler, keys = registry.parse(own['sampler'])
    return own | {'sampler': registry.unparse(sampler, keys | {'stop_sigma': levels.lowest})}


def next_steps(config: Config, network: str) -> list[str]:
    """Lines for the console at the end of a run of this Config: what to do with its last snapshot, a path for a command line."""
    c, name = config.corruption, config.run.regime
    noise = f' --sigma={c.sigma:g} --corruption-probability={c.probability:g} --corruption-seed={c.seed}' if c.sigma else ''
    values = dict(network=network, data=shlex.quote(config.data.path), noise=noise, half=config.run.duration_kimg / 2e3,
                  tenth=config.run.duration_kimg / 1e4)
    lines = []
    for purpose, command in REGIMES[name].after if name else ():
        lines += [f'{purpose}:', f'  {command.format(**values)}']
    return lines


DISTILL = ('To distil it to a generator of one evaluation (docs/distillation.md)',
           'python train.py --outdir=runs --data={data}{noise} --distill=rsd:teacher={network} --duration={half:g} --batch=256 --lr=1e-5 '
           '--optimizer=adam:beta1=0 --lr-rampup=0')
REFINE = ('To restore the noisy images with it and train on (docs/refinement.md)',
          'python refine.py --network={network} --duration={tenth:g} --outdir=refined')

REGIMES = {AUTO: Regime('any data: the one of these that fits it'), 'all-clean': Regime('data without noise'),
           'few-clean': Regime('data of which some images are clean', truncated_below=0.03),
           'noisy-only': Regime('data without a clean image', truncated_below=1, after=(DISTILL, REFINE))}
