# SPDX-License-Identifier: Apache-2.0
"""What the scripts' command lines share: --version, underscores as hyphens, lists of whole numbers, errors in one line."""

import contextlib
import functools
import math
import re
import time
import traceback

import click

from dnnlib import UserError
from torch_utils import distributed, misc, registry
from torch_utils.monitor import EXIT_LOST

PATIENCE_SEC = 5  # what torchrun needs, amply, to end the other ranks after the first has failed


class Command(click.Command):
    """A click command in which --batch_size is --batch-size, an error is one line, once for all ranks, and the ranks part at the end."""

    def parse_args(self, ctx, args):
        with rank0_first(), one_line_errors():
            return super().parse_args(ctx, hyphens(args))

    def invoke(self, ctx):
        try:
            with rank0_first(), one_line_errors():
                return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except (Exception, KeyboardInterrupt) as err:  # but not SystemExit, with which a rank ends of its own will
            distributed.fail(f'{type(err).__name__} {err}')
            raise
        finally:
            distributed.shutdown()

    def main(self, *args, **kwargs):
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            distributed.end(end.code if isinstance(end.code, int) else 1)
            raise
        except Exception:
            if distributed.has_failed():
                traceback.print_exc()
            distributed.end(1)
            raise


def options_of(*options):
    """A decorator that adds click options to a command, in this order."""
    return lambda command: functools.reduce(lambda found, option: option(found), reversed(options), command)


def hyphens(args):
    """Option names with hyphens, values as they are: ['--batch_size=4', 'a_b'] -> ['--batch-size=4', 'a_b']."""
    return [re.sub(r'^--[^=]+', lambda m: m[0].replace('_', '-'), arg) for arg in args]


@contextlib.contextmanager
def rank0_first():
    """An error that all ranks meet is shown once: by rank 0, after which torchrun ends the others. Theirs alone is shown a little later.

    The waiting comes before the process group is left: rank 0 would fail for its lack, and torchrun end this rank unheard."""
    try:
        yield
    except click.ClickException as err:
        distributed.fail(err.format_message())
        if not distributed.rank():
            raise
        # All ranks lose one that is gone: the first of another node speaks for its own.
        time.sleep(PATIENCE_SEC * (2 if err.exit_code == EXIT_LOST and distributed.local_rank() else 1))
        err.show()
        raise SystemExit(err.exit_code) from None


@contextlib.contextmanager
def one_line_errors():
    """Turns mistakes of the user, of usage (which click shows in three lines) and errors of the file system into one-line errors."""
    try:
        yield
    except UserError as err:
        raise click.ClickException(err.message) from None
    except click.UsageError as err:
        plain = click.ClickException(err.format_message())
        plain.exit_code = err.exit_code
        raise plain from None
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as err:
        raise click.ClickException(f'{err.filename}: {err.strerror}') from None
    except OSError as err:
        raise click.ClickException(f'{err.filename or "file system"}: {err.strerror or err}') from None
    except RuntimeError as err:
        text = distributed.explain(err)
        if text is None:
            raise
        lost = click.ClickException(text)
        lost.exit_code = EXIT_LOST
        raise lost from None


def version_option(command):
    """Adds --version: program, commit, Python, torch, CUDA."""

    def show(ctx, param, value):
        if value and not ctx.resilient_parsing:
            click.echo(', '.join(f'{name} {value}' for name, value in misc.versions().items()))
            ctx.exit()

    return click.option('--version', is_flag=True, expose_value=False, is_eager=True, callback=show,
                        help='Print version, commit, Python, torch and CUDA, and leave')(command)


class IntList(click.ParamType):
    """"1,2,5-10" -> [1, 2, 5, 6, 7, 8, 9, 10]."""

    name = 'LIST'

    def convert(self, value, param, ctx):
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

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        found = [registry.parse_number(item.strip()) for item in str(value).split(',')]
        if any(isinstance(item, str) or not math.isfinite(item) for item in found):
            self.fail(f'"{value}" is not a list of numbers such as 1,1.5,2', param, ctx)
        return [float(item) for item in found]


def ranges(numbers):
    """Whole numbers as IntList reads them: [0, 1, 2, 5] -> "0-2,5"."""
    numbers = sorted(set(numbers))
    starts = [n for i, n in enumerate(numbers) if not i or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ','.join(str(first) if first == last else f'{first}-{last}' for first, last in zip(starts, ends))


class Names(click.ParamType):
    """"fid,kid" -> ('fid', 'kid'), of the choices, in their order."""

    name = 'NAMES'

    def __init__(self, choices):
        self.choices = choices

    def convert(self, value, param, ctx):
        named = value if isinstance(value, tuple) else tuple(str(value).split(','))
        unknown = [name for name in named if name not in self.choices]
        if unknown:
            self.fail(f'"{unknown[0]}" in "{value}" is none of {", ".join(self.choices)}', param, ctx)
        return tuple(name for name in self.choices if name in named)


class Number(click.ParamType):
    """A finite number within bounds; the bounds of click let nan through."""

    name = 'NUMBER'

    def __init__(self, above=None, least=None, most=None):
        self.above, self.least, self.most = above, least, most

    def convert(self, value, param, ctx):
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


def ints(ctx, param, value):
    """'1,2,2' -> [1, 2, 2]."""
    try:
        return None if value is None else [int(item) for item in value.split(',')]
    except ValueError:
        raise click.BadParameter(f'"{value}" is not a list of whole numbers such as 1,2,2,2') from None


def groups(ctx, param, value):
    """'0,1/3,5,7' -> [[0, 1], [3, 5, 7]]."""
    return None if value is None else [ints(ctx, param, part) for part in value.split('/')]


class Spec(click.ParamType):
    """A command-line option that names a piece of a registry; checked at once, handed on as the text it is."""

    name = 'NAME[:key=value,...]'

    def __init__(self, registry):
        self.registry = registry

    def convert(self, value, param, ctx):
        registry.check(value, self.registry, max(param.opts, key=len) if param else 'option')
        return value

    def get_metavar(self, param, ctx=None):
        return '|'.join(self.registry) + '[:k=v]'
