# SPDX-License-Identifier: Apache-2.0
"""The program's click commands, run in this process."""

from click.testing import CliRunner


def run(main, *args, code=0):
    """Runs a command, which must end with this code; returns what it prints."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def refused(main, *args):
    """The one line of a refusal."""
    lines = run(main, *args, code=1).strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('Error: '), lines
    return lines[0]
