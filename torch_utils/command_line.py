# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the scripts' command lines: groups of options, --version, NAME=help, underscores as hyphens, one-line errors.

Nothing here imports torch before a command runs, so that --help and --version answer at once."""

import contextlib
import functools
import math
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from types import ModuleType
from typing import Any

import click

from dnnlib import UserError
from dnnlib.versions import versions
from torch_utils import registry
from torch_utils.monitor import EXIT_LOST

PATIENCE_SEC = 5  # more than torchrun needs to end the other ranks after the first has failed
WIDTH, NAMES_WIDTH = 120, 34  # characters: of the help, and of its column of names
LAUNCHED = {'WORLD_SIZE', 'SLURM_PROCID'}  # environment variables that are set if there are several ranks
HELP = 'help'  # the value that makes an option print its choices


def ranks() -> ModuleType:
    """The module torch_utils.distributed, which imports torch."""
    from torch_utils import distributed
    return distributed


def alone() -> bool:
    """Whether there are no other ranks: the process was not launched as one of several, and has not joined any."""
    return not LAUNCHED & os.environ.keys() and 'torch_utils.distributed' not in sys.modules


class Command(click.Command):
    """A click command that accepts --batch_size for --batch-size, prints an error as one line, once for all ranks, and shuts down the
    process group at the end.

    Its help lists the options in groups (see group()), with the defaults in brackets."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs['context_settings'] = {'help_option_names': ['-h', '--help'], **(kwargs.get('context_settings') or {})}
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with rank0_first(), one_line_errors():
            return super().parse_args(ctx, hyphens(args))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with rank0_first(), one_line_errors():
                return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except (Exception, KeyboardInterrupt) as err:  # but not SystemExit, with which a rank ends on purpose
            if not alone():
                ranks().fail(f'{type(err).__name__} {err}')
            raise
        finally:
            if not alone():
                ranks().shutdown()

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            if not alone():
                ranks().end(end.code if isinstance(end.code, int) else 1)
            raise
        except Exception:
            if not alone():
                if ranks().has_failed():
                    traceback.print_exc()
                ranks().end(1)
            raise

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        return super().make_context(info_name, args, parent, **{'terminal_width': WIDTH, **extra})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options by group, one per row; those of one row() share a row."""
        rows = {}  # group -> row -> [names, text]
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None or isinstance(param, click.Argument):
                continue
            names, text = record
            told = getattr(param, 'row', None)
            row = rows.setdefault(getattr(param, 'group', 'Options'), {}).setdefault(told or names, [[], told])
            row[0].append(max(param.opts, key=len) if told else names)
            row[1] = told or text
        for title, of_group in sorted(rows.items(), key=lambda item: item[0] == 'Options'):
            formatter.write(f'\n{title}:\n')
            for names, text in of_group.values():
                formatter.write(help_row(', '.join(names), text))


class Group(Command, click.Group):
    """A group of commands; an unknown command is refused in one line. `group.default` is the command that runs if none is named."""

    default = None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self.default and args and args[0].startswith('-') and args[0] not in ('-h', '--help', '--version'):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        if args[0] not in self.commands:
            options = f'; options of {self.default} begin with "--"' if self.default else ''
            raise click.UsageError(f'no command "{args[0]}"; choose from {", ".join(sorted(self.commands))}{options}', ctx)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        formatter.write('\nCommands (COMMAND --help lists their options):\n')
        for name, command in sorted(self.commands.items()):
            formatter.write(help_row(name, command.get_short_help_str(WIDTH)))


def help_row(names: str, text: str | None) -> str:
    """Names and text in two columns; text as given by click, without the word "default"."""
    text = re.sub(r'\[default: ', '[', ' '.join((text or '').split())).replace('[(', '[').replace(')]', ']')
    bounds = r'[-\d.<>=]*x[-\d.<>=]*\]'  # bounds, which are shown in errors instead
    text = re.sub(r' \[' + bounds, '', re.sub('; ' + bounds, ']', text))
    lines = textwrap.wrap(text, WIDTH - NAMES_WIDTH - 4) or ['']
    if len(names) > NAMES_WIDTH:
        lines.insert(0, '')
        if len(lines) == 2 and len(names) + len(lines[1]) + 6 <= WIDTH:  # a long name and a short text
            return f'  {names}  {lines[1]}\n'
    rest = ''.join(' ' * (NAMES_WIDTH + 4) + line + '\n' for line in lines[1:])
    return f'  {names:<{NAMES_WIDTH}}  {lines[0]}'.rstrip() + '\n' + rest


def group(title: str, *options: Callable) -> Callable:
    """A decorator that adds click options to a command, in this order, under this title in its help."""
    def decorate(command):
        for option in reversed(options):
            option(command)
            command.__click_params__[-1].group = title
        return command
    return decorate


def row(text: str, option: Callable) -> Callable:
    """A click option that shares one row of the help with other options of the same `text`."""
    def decorate(command):
        option(command)
        command.__click_params__[-1].row = text
        return command
    return decorate


def options_of(*options: Callable) -> Callable:
    """A decorator that adds click options to a command, in this order."""
    return lambda command: functools.reduce(lambda found, option: option(found), reversed(options), command)


def hyphens(args: Iterable[str]) -> list[str]:
    """Option names with hyphens, values as they are: ['--batch_size=4', 'a_b'] -> ['--batch-size=4', 'a_b']."""
    return [re.sub(r'^--[^=]+', lambda m: m[0].replace('_', '-'), arg) for arg in args]


@contextlib.contextmanager
def rank0_first() -> Iterator[None]:
    """Shows an error that all ranks raise once: by rank 0, after which torchrun ends the others. An error of another rank alone is shown
    a little later.

    That rank waits before it leaves the process group: rank 0 would fail at once, and torchrun end this rank before it has printed."""
    try:
        yield
    except click.ClickException as err:
        if alone():
            raise
        ranks().fail(err.format_message())
        if not ranks().rank():
            raise
        # If a rank is lost, all others notice: on other nodes, the first rank reports for its node.
        time.sleep(PATIENCE_SEC * (2 if err.exit_code == EXIT_LOST and ranks().local_rank() else 1))
        err.show()
        raise SystemExit(err.exit_code) from None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns user errors, usage errors (which click shows in three lines) and file system errors into one-line errors."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort):  # subclasses of RuntimeError
        raise
    except UserError as err:
        raise click.ClickException(err.message) from None
    except click.UsageError as err:
        if type(err).__name__ == 'NoArgsIsHelpError':  # a group without a command prints its help
            raise
        plain = click.ClickException(err.format_message())
        plain.exit_code = err.exit_code
        raise plain from None
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as err:
        raise click.ClickException(f'{err.filename}: {err.strerror}') from None
    except OSError as err:
        raise click.ClickException(f'{err.filename or "file system"}: {err.strerror or err}') from None
    except RuntimeError as err:
        text = ranks().explain(err)
        if text is None:
            raise
        lost = click.ClickException(text)
        lost.exit_code = EXIT_LOST
        raise lost from None


def version_option(command: Callable) -> Callable:
    """Adds --version: program, commit, Python, torch, CUDA."""

    def show(ctx, param, value):
        if value and not ctx.resilient_parsing:
            click.echo(', '.join(f'{name} {value}' for name, value in versions().items()))
            ctx.exit()

    return click.option('--version', is_flag=True, expose_value=False, is_eager=True, callback=show,
                        help='Print version, commit, Python, torch and CUDA, and exit')(command)


class IntList(click.ParamType):
    """"1,2,5-10" -> [1, 2, 5, 6, 7, 8, 9, 10]."""

    name = 'LIST'

    def convert(self, value: str | list[int], param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        numbers = []
        for item in str(value).split(','):
            match = re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', item)
            if not match:
                self.fail(f'"{value}" is not a list of whole numbers such as 0-49 or 1,2,5-10', param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f'the range "{item.strip()}" in "{value}" runs backwards; write {last}-{first}', param, ctx)
            numbers.extend(range(first, last + 1))
        return numbers


class FloatList(click.ParamType):
    """"1,1.5,2" -> [1.0, 1.5, 2.0], finite numbers."""

    name = 'LIST'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        found = [registry.parse_number(item.strip()) for item in str(value).split(',')]
        if any(isinstance(item, str) or not math.isfinite(item) for item in found):
            self.fail(f'"{value}" is not a list of numbers such as 1,1.5,2', param, ctx)
        return [float(item) for item in found]


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in the notation of IntList: [0, 1, 2, 5] -> "0-2,5"."""
    numbers = sorted(set(numbers))
    starts = [n for i, n in enumerate(numbers) if not i or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ','.join(str(first) if first == last else f'{first}-{last}' for first, last in zip(starts, ends))


class Names(click.ParamType):
    """"fid,kid" -> ('fid', 'kid'), in the order of the choices. "help" lists the choices.

    choices: names, a registry, or "package.module:NAME", which is imported when it is needed."""

    name = 'NAMES'

    def __init__(self, choices: Collection[str] | str):
        self._choices = choices

    @property
    def choices(self) -> Collection[str]:
        return registry.find(self._choices) if isinstance(self._choices, str) else self._choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if value == HELP and ctx is not None:
            show_choices(ctx, choices_text(max(param.opts, key=len), self.choices, keys=False))
        named = value if isinstance(value, tuple) else tuple(str(value).split(','))
        unknown = [name for name in named if name not in self.choices]
        if unknown:
            self.fail(f'"{unknown[0]}" in "{value}" is unknown; choose from {", ".join(self.choices)}', param, ctx)
        return tuple(name for name in self.choices if name in named)


class Number(click.ParamType):
    """A finite number within bounds; click's own ranges accept nan."""

    name = 'NUMBER'

    def __init__(self, above: float | None = None, least: float | None = None, most: float | None = None):
        self.above, self.least, self.most = above, least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        bounds = [f'above {self.above}' if self.above is not None else '', f'{self.least} or more' if self.least is not None else '',
                  f'{self.most} or less' if self.most is not None else '']
        try:
            number = float(value)
            inside = math.isfinite(number) and not (self.above is not None and number <= self.above
                                                    or self.least is not None and number < self.least
                                                    or self.most is not None and number > self.most)
        except ValueError:
            inside = False
        if not inside:
            self.fail(f'"{value}" is not a number that is {" and ".join(filter(None, bounds)) or "finite"}', param, ctx)
        return number


class AutoOr(click.ParamType):
    """The word "auto", or a value of another type."""

    name = 'VALUE'

    def __init__(self, kind: click.ParamType | type):
        self.kind = click.types.convert_type(kind)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == 'auto':
            return value
        try:
            return self.kind.convert(value, param, ctx)
        except click.BadParameter as err:
            raise click.BadParameter(f'{err.message.rstrip(".")}, nor "auto"', ctx, param) from None


def ints(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """'1,2,2' -> [1, 2, 2]."""
    try:
        return None if value is None else [int(item) for item in value.split(',')]
    except ValueError:
        raise click.BadParameter(f'"{value}" is not a list of whole numbers such as 1,2,2,2') from None


def groups(ctx: click.Context, param: click.Parameter, value: str | None) -> list[list[int]] | None:
    """'0,1/3,5,7' -> [[0, 1], [3, 5, 7]]."""
    return None if value is None else [ints(ctx, param, part) for part in value.split('/')]


class Spec(click.ParamType):
    """A command-line option that names an entry of a registry; checked at once, passed on as text. "help" lists the entries.

    registry: the dict, or "package.module:NAME", which is imported when it is needed. keys: whether an entry may be given keys."""

    name = 'NAME[:key=value,...]'

    def __init__(self, registry: dict | str, keys: bool = True):
        self._registry, self._keys = registry, keys

    @property
    def registry(self) -> dict:
        return registry.find(self._registry) if isinstance(self._registry, str) else self._registry

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = max(param.opts, key=len) if param else 'option'
        if value == HELP and ctx is not None:
            show_choices(ctx, choices_text(name, self.registry, self._keys))
        if self._keys:
            registry.check(value, self.registry, name)
        elif value not in self.registry:
            raise UserError(f'{name}={value}: choose from {", ".join(self.registry)}')
        return value

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return 'NAME[:k=v]' if self._keys else 'NAME'


def show_choices(ctx: click.Context, text: str) -> None:
    """Prints the choices of an option, once for all ranks, and exits with code 0."""
    if os.environ.get('RANK', '0') == '0':
        click.echo(text)
    ctx.exit()


def choices_text(option: str, choices: Any, keys: bool = True) -> str:
    """The text that --OPTION=help prints: each choice with a sentence, and its keys with their defaults."""
    found = registry.listing(choices) if isinstance(choices, dict) else [(name, '', {}) for name in choices]
    width = max(len(name) for name, *_ in found) + 2
    lines = [f'{option}=NAME' + (f' or {option}=NAME:key=value,key=value' if keys and any(told for *_, told in found) else ''), '']
    for name, text, told in found:
        shown = textwrap.wrap(text, WIDTH - width - 2)
        if keys and told:
            shown += textwrap.wrap('keys: ' + ', '.join(f'{key}={value}' for key, value in told.items()), WIDTH - width - 2)
        lines += [f'  {name if not i else "":<{width}}{line}' for i, line in enumerate(shown or [''])]
    return '\n'.join(lines)
