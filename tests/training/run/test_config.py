# SPDX-License-Identifier: Apache-2.0
"""The configuration tree: options that version 0.1.0 wrote are those of today's program for the same command line."""

import json

import pytest

from dnnlib import UserError
from tests.support import GOLDEN, tiny
from torch_utils import checkpoint
from training.run.config import from_json, to_json

# options.json of runs of version 0.1.0, each with its flags beside tiny's own; without path and versions.
WRITTEN = json.loads((GOLDEN / 'run' / 'options-0.1.0.json').read_text())


@pytest.mark.parametrize('case', WRITTEN, ids=['conditions', 'published consistency', 'bridge'])
def test_options_of_0_1_0_are_read(tmp_path, case):
    told, today = from_json(case['options']), tiny.options(tmp_path, *case['flags'])
    found = checkpoint.differences(to_json(told), to_json(today), ignore=('data.path', 'data.fingerprint', 'run.versions', 'run.command'))
    assert found == []
    assert from_json(to_json(told)) == told


def test_options_of_0_1_0_that_are_not_whole_are_refused():
    old = {key: value for key, value in WRITTEN[0]['options'].items() if key != 'corruption'}
    with pytest.raises(UserError, match="configuration: missing key 'corruption' of version 0.1.0"):
        from_json(old)


@pytest.mark.parametrize('values', [[], None, 'text', {'lr_rampup_kimg': 1}, {'lr_rampup_kimg': 1, 'optimizer': None},
                                    {'lr_rampup_kimg': 1, 'optimizer': 3, 'objective': 'x'}])
def test_what_is_no_configuration_is_refused_in_one_line(values):
    with pytest.raises(UserError, match='^configuration: ') as err:
        from_json(values)
    assert '\n' not in err.value.message


def test_older_options_know_no_fingerprint(tmp_path):
    today = tiny.options(tmp_path)
    assert from_json(WRITTEN[0]['options']).data.fingerprint is None and today.data.fingerprint['images'] == 64
    values = to_json(today)
    del values['data']['fingerprint']  # as version 0.2.0 wrote them
    assert from_json(values).data.fingerprint is None
    assert from_json(json.loads(json.dumps(to_json(today)))) == today
    values['data']['fingerprint'] = 'text'
    with pytest.raises(UserError, match='^configuration: "data.fingerprint" must be dict'):
        from_json(values)
