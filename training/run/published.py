# SPDX-License-Identifier: Apache-2.0
"""Options under their published names (EDM, ambient-laws), and what they are called here."""

import click

from dnnlib import UserError
from torch_utils import registry
from torch_utils.command_line import Number, group, ints, row

COUNT, NOT_NEGATIVE = click.IntRange(min=1), Number(least=0)
KEYS = 'Keys of --arch, as EDM names them: --cbase=128 --cres=1,2,2'
CHAIN = 'Keys of --consistency=euler, as ambient-laws names them (docs/consistency.md)'
OTHERS = 'Key of --optimizer; --precision=fp16, kept in config.json; if False, --cache-gib=0'


def _option(name, kind, metavar, text, **more):
    return click.option(name, type=kind, metavar=metavar, help=text, **more)


OPTIONS = group(
    'Published names',
    row(KEYS, _option('--cbase', COUNT, 'INT', 'Channels of the first level')),
    row(KEYS, _option('--cres', None, 'LIST', 'Channels of each level, in multiples of --cbase', callback=ints)),
    row(KEYS, _option('--blocks', COUNT, 'INT', 'Residual blocks a level')),
    row(KEYS, _option('--attn', None, 'LIST', 'Heights of the levels that attend', callback=ints)),
    row(KEYS, _option('--dropout', Number(least=0, most=0.99), 'FLOAT', 'Dropout probability')),
    row(CHAIN, _option('--consistency-coeff', NOT_NEGATIVE, 'FLOAT', 'Factor of the consistency loss; 0: off')),
    row(CHAIN, _option('--consistency-batch-size', COUNT, 'INT', 'Its batch_size')),
    row(CHAIN, _option('--num-consistency-steps', click.IntRange(min=2), 'INT', 'Levels of a chain, both ends counted: steps + 1')),
    row(CHAIN, _option('--num-primes', COUNT, 'INT', 'Its samples')),
    row(CHAIN, _option('--with-weight', bool, 'BOOL', 'Its weighted')),
    row(CHAIN, _option('--with-grad', bool, 'BOOL', 'Its grad')),
    row(OTHERS, _option('--weight-decay', NOT_NEGATIVE, 'FLOAT', 'Key of --optimizer  [default: 0 for adam]')),
    row(OTHERS, _option('--fp16', bool, 'BOOL', '--precision=fp16, kept in config.json', default=False, show_default=True)),
    row(OTHERS, _option('--cache', bool, 'BOOL', 'False: --cache-gib=0', default=True, show_default=True)),
)


def consistency(o):
    """--consistency, or the published options in its form; None where the term is off."""
    given = dict(coeff=o.consistency_coeff, batch_size=o.consistency_batch_size, samples=o.num_primes, weighted=o.with_weight,
                 grad=o.with_grad, steps=o.num_consistency_steps and o.num_consistency_steps - 1)
    given = {key: value for key, value in given.items() if value is not None}
    if o.consistency and given:
        raise UserError(f'--consistency={o.consistency} and the published options (--consistency-coeff and companions) '
                        'exclude each other; give one form')
    if not given.get('coeff'):
        return o.consistency
    if (size := given.get('batch_size', 32)) > o.batch:
        raise UserError(f'--consistency-batch-size={size} is larger than --batch={o.batch}; use at most that')
    from training.objective.consistency import published_spec
    return published_spec(**given)


def architecture(o):
    """--arch with the published options that are keys of it."""
    name, told = registry.parse(o.arch)
    keys = {key: o[key] for key in ('cbase', 'cres', 'blocks', 'attn', 'dropout') if o[key] is not None}
    for key, value in keys.items():
        if key in told:
            raise UserError(f'--{key}={value} and --arch={o.arch}: "{key}" is given twice; give one of them')
    return registry.unparse(name, told | keys)


def optimizer(o):
    """--optimizer with the published option that is a key of it."""
    name, told = registry.parse(o.optimizer)
    if o.weight_decay is None:
        return o.optimizer
    if 'weight_decay' in told:
        raise UserError(f'--weight-decay={o.weight_decay} and --optimizer={o.optimizer}: it is given twice; give one of them')
    return registry.unparse(name, told | {'weight_decay': o.weight_decay}) if o.weight_decay or name != 'adam' else o.optimizer
