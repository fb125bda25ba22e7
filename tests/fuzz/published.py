# SPDX-License-Identifier: Apache-2.0
"""Attacks, as in checkpoints.py, on what reads EDM2's published files."""

from tests.fuzz.checkpoints import EDM2, Pickle, build
from tests.support import edm_pickle
from tests.support.hostile import pick
from training.checkpoints import posthoc


class EDM2Pickle(Pickle):
    """EDM2's edm2-*.pkl: half storages, scalars, arrays, and a dict of another class."""

    def make(self, marker):
        arguments = {**EDM2, 'img_resolution': 8, 'logvar_channels': 8}
        net = build({key: value for key, value in arguments.items() if key != 'logvar_channels'})
        arguments.pop('model_type')
        return [edm_pickle.edm2_snapshot(net.model, arguments, marker, **options)
                for options in ({}, {'old_torch': True}, {'encoder': None})]


class PublishedAverages(EDM2Pickle):
    """A folder of EDM2's snapshots, one of them damaged, from which an average is made."""

    def prepare(self, folder):
        super().prepare(folder)
        self.run, self.path = folder / 'run', None
        self.run.mkdir()
        self.paths = [self.run / f'edm2-img64-s-{kimg:07d}-{width}.pkl' for kimg in (33554, 67108) for width in ('0.050', '0.100')]
        for path in self.paths:
            path.write_bytes(self.sound[0])

    def write(self, draws):
        if self.path is not None:
            self.path.unlink()
        for path in self.paths:
            path.write_bytes(self.sound[0])
        self.path = pick(self.paths, draws)
        if draws.random() < 0.3:
            self.path = self.run / pick(['x.pkl', 'edm2-img64-s-0033554-0.000.pkl', 'edm2-img64-s-9999999-0.050.pkl', '\x1b[31m.pkl',
                                         'edm2-img64-xs-0033554-0.050.pkl', 'edm2-img64-s-0033554-0.999.pkl'], draws)
        self.path.write_bytes(self.damage(draws))

    def read(self):
        posthoc.reconstruct(str(self.run), 0.07)
