# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the pairing policies runs on every mix and prints a table."""

from click.testing import CliRunner

from benchmarks import pairs


def test_every_mix_has_a_row():
    output = CliRunner().invoke(pairs.main, ['--images=300', '--seconds=0.001', '--pairing=skip', '--pairing=sigma_first'],
                                catch_exceptions=False).output
    rows = [line.split('|')[1:-1] for line in output.splitlines() if line.startswith('|')][2:]
    names = [name for name, *_ in pairs.mixes(300)]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [(name, policy) for name in names for policy in ('skip', 'sigma_first')]
    assert all(int(cell.replace(',', '')) > 0 for row in rows for cell in row[3:])
