# SPDX-License-Identifier: Apache-2.0
"""--preset and --config: options of a published recipe or of an earlier run, which those on the command line override.

A preset is a JSON file in training/presets: what it "reproduces", its "source", the published "figure" and cost ("mimg", "gpu_hours",
"cost"; null where none is published), what is "unconfirmed" about it, image_shape [C,H,W] and classes of its data, and its "options"."""

from pathlib import Path

import click

from dnnlib import UserError
from dnnlib.files import read_json
from torch_utils.command_line import HELP, show_choices

FOLDER = Path(__file__).resolve().parent.parent / 'presets'
NOT_REPEATED = ('outdir', 'nosubdir', 'resume', 'dry_run')  # options of one start of a run, not of what it trains


def names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob('*.json'))


def read(name: str) -> dict:
    """The content of a preset. Raises UserError."""
    if name not in names():
        raise UserError(f'--preset={name}: unknown; choose from {", ".join(names())}')
    return read_json(FOLDER / f'{name}.json')


def use_preset(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """click's callback of --preset."""
    if value == HELP:
        show_choices(ctx, listing())
    if value is not None:
        found = read(value)
        options = {key: str(item) for key, item in found['options'].items()}
        _under(ctx, f'--preset={value}', options, found['reproduces'])


def use_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """click's callback of --config."""
    if value is None:
        return
    run = read_json(value).get('run')
    if not isinstance(run, dict) or not isinstance(run.get('command'), dict) or not run['command']:
        raise UserError(f'--config={value}: holds no options of a command; expected options.json of a run of this version or a later one')
    _under(ctx, f'--config={value}', {**run['command'], 'seed': run.get('seed')}, 'an earlier run')


def _under(ctx, where, options, what):
    """Makes these options the defaults of the command. Raises UserError for options that it does not have."""
    if ctx.meta.get(KEY):
        raise UserError(f'{ctx.meta[KEY]["where"]} and {where} exclude each other; give one of them')
    params = {param.name for param in ctx.command.params}
    unknown = sorted(set(options) - params)
    if unknown:
        raise UserError(f'{where}: unknown option "{unknown[0]}"')
    ctx.default_map = {**(ctx.default_map or {}), **options}
    ctx.meta[KEY] = {'where': where, 'options': options, 'what': what}


def given(ctx: click.Context) -> dict:
    """{option: value} from the command line and from --preset or --config, as JSON types: what --config repeats."""
    explicit = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP)
    return {param.name: text(ctx.params[param.name], getattr(param, 'multiple', False)) for param in ctx.command.params
            if param.name in ctx.params and param.name not in NOT_REPEATED and ctx.get_parameter_source(param.name) in explicit}


def text(value: object, multiple: bool = False) -> str | bool | list:
    """A value as it is written on the command line; a list of those where the option may be repeated."""
    if multiple:
        return list(value)
    if isinstance(value, (tuple, list)):
        nested = any(isinstance(item, (tuple, list)) for item in value)
        return '/'.join(map(text, value)) if nested else ','.join(map(str, value))
    return value if isinstance(value, bool) else str(value)


def told(ctx: click.Context) -> str | None:
    """A line about the --preset or --config in use, and which of its options the command line overrides; None where there is neither."""
    used = ctx.meta.get(KEY)
    if used is None:
        return None
    changed = [f'--{name.replace("_", "-")}={text(ctx.params[name])} instead of {used["options"][name]}' for name in used['options']
               if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
               and str(text(ctx.params[name])) != str(used['options'][name])]
    return f'{used["where"]}: {used["what"]}' + (f'; {", ".join(changed)}' if changed else '')


def listing() -> str:
    """What --preset=help prints."""
    lines = ['--preset=NAME, together with --data and --outdir', '']
    for name in names():
        found = read(name)
        hours = f'{found["gpu_hours"]} GPU hours ({found["cost"]})' if found['gpu_hours'] else 'GPU hours not published'
        length = f'{found["mimg"]} Mimg' if found['mimg'] else 'length not published'
        lines += [name, f'  {found["reproduces"]}; {found["source"]}', f'  published: {found["figure"]}', f'  cost: {length}, {hours}',
                  *([f'  not confirmed: {found["unconfirmed"]}'] if 'unconfirmed' in found else []),
                  '  ' + ' '.join(f'--{key.replace("_", "-")}={value}' for key, value in found['options'].items()), '']
    return '\n'.join(lines).rstrip()


KEY = 'training.run.presets'  # in click's meta
