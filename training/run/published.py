# SPDX-License-Identifier: Apache-2.0
"""Options under their published names (EDM, ambient-laws), and what they are called here."""

import click

from dnnlib import EasyDict, UserError
from torch_utils import registry
from torch_utils.command_line import Number, group, ints, row

COUNT, NOT_NEGATIVE = click.IntRange(min=1), Number(least=0)
KEYS = 'Keys of --arch, as EDM names them: --cbase=128 --cres=1,2,2'
CHAIN = 'Keys of --consistency=euler, as ambient-laws names them (docs/consistency.md)'
OTHERS = 'Older forms of --optimizer, --precision, --cache-gib, --checkpoint'


def _option(name, kind, metavar, text, **more):
    return click.option(name, type=kind, metavar=metavar, help=text, **more)


OPTIONS = group(
    'Published names',
    row(KEYS, _option('--cbase', COUNT, 'INT', 'Channels of the first level')),
    row(KEYS, _option('--cres', None, 'LIST', 'Channels of each level, in multiples of --cbase', callback=ints)),
    row(KEYS, _option('--blocks', COUNT, 'INT', 'Residual blocks per level')),
    row(KEYS, _option('--attn', None, 'LIST', 'Resolutions (heights) with self-attention', callback=ints)),
    row(KEYS, _option('--dropout', Number(least=0, most=0.99), 'FLOAT', 'Dropout probability')),
    row(CHAIN, _option('--consistency-coeff', NOT_NEGATIVE, 'FLOAT', 'coeff: factor of the consistency loss; 0: off')),
    row(CHAIN, _option('--consistency-batch-size', COUNT, 'INT', 'batch_size: images of a batch that it looks at')),
    row(CHAIN, _option('--num-consistency-steps', click.IntRange(min=2), 'INT', 'steps + 1: levels of a chain, counting both ends')),
    row(CHAIN, _option('--num-primes', COUNT, 'INT', 'samples: chains per image')),
    row(CHAIN, _option('--with-weight', bool, 'BOOL', 'weighted: multiply by w(sigma)')),
    row(CHAIN, _option('--with-grad', bool, 'BOOL', 'grad: differentiate through the chains')),
    row(OTHERS, _option('--weight-decay', NOT_NEGATIVE, 'FLOAT', 'Key of --optimizer  [default: 0 for adam]')),
    row(OTHERS, _option('--fp16', bool, 'BOOL', '--precision=fp16, saved in config.json', default=False, show_default=True)),
    row(OTHERS, _option('--cache', bool, 'BOOL', 'False: --cache-gib=0', default=True, show_default=True)),
    row(OTHERS, _option('--checkpointing', bool, 'BOOL', 'True: --checkpoint=blocks')),
)


def consistency(o: EasyDict) -> str | None:
    """The --consistency that is meant, also where the published options give it; None where the term is off."""
    given = dict(coeff=o.consistency_coeff, batch_size=o.consistency_batch_size, samples=o.num_primes, weighted=o.with_weight,
                 grad=o.with_grad, steps=o.num_consistency_steps and o.num_consistency_steps - 1)
    given = {key: value for key, value in given.items() if value is not None}
    if o.consistency and given:
        raise UserError(f'--consistency={o.consistency} and the published options (--consistency-coeff and the like) '
                        'exclude each other; use one form')
    if not given.get('coeff'):
        return o.consistency
    if (size := given.get('batch_size', 32)) > o.batch:
        raise UserError(f'--consistency-batch-size={size} is larger than --batch={o.batch}; use at most that')
    from training.objective.consistency import published_spec
    return published_spec(**given)


def architecture(o: EasyDict) -> str:
    """--arch, with the published options that are keys of it."""
    name, given = registry.parse(o.arch)
    keys = {key: o[key] for key in ('cbase', 'cres', 'blocks', 'attn', 'dropout') if o[key] is not None}
    for key, value in keys.items():
        if key in given:
            raise UserError(f'--{key}={value} and --arch={o.arch}: "{key}" is given twice; give one of them')
    return registry.unparse(name, given | keys)


def checkpoint(o: EasyDict) -> str:
    """--checkpoint, also where --checkpointing gives it."""
    if o.checkpointing is None:
        return o.checkpoint
    if o.checkpoint != 'none' and o.checkpointing != (o.checkpoint == 'blocks'):
        raise UserError(f'--checkpointing={int(o.checkpointing)} and --checkpoint={o.checkpoint} exclude each other; give one of them')
    return 'blocks' if o.checkpointing else 'none'


def optimizer(o: EasyDict) -> str:
    """--optimizer, with the published option that is a key of it."""
    name, given = registry.parse(o.optimizer)
    if o.weight_decay is None:
        return o.optimizer
    if 'weight_decay' in given:
        raise UserError(f'--weight-decay={o.weight_decay} and --optimizer={o.optimizer}: "weight_decay" is given twice; give one of them')
    return registry.unparse(name, given | {'weight_decay': o.weight_decay}) if o.weight_decay or name != 'adam' else o.optimizer
