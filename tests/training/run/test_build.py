# SPDX-License-Identifier: Apache-2.0
"""What the objects of a run refuse of each other."""

import math

import pytest

from dnnlib import UserError
from training.data.pairs import PairStream
from training.diffusion.noise import LogNormal
from training.run.build import check_timesteps


@pytest.mark.parametrize('limits', [{'lower': [0.5, 0.0]}, {'upper': [math.inf, 0.5]}, {'lower': [0.5, 0.0], 'upper': [0.2, math.inf]}])
def test_levels_drawn_anew_need_images_without_limits(limits):
    """A lower limit raises the bar of a clean image, which is a clean image nonetheless."""
    check_timesteps('second_moment', PairStream([0.0, 0.1], LogNormal(), batch=4))
    with pytest.raises(UserError, match='--timesteps=second_moment .* some images have a sigma_min or sigma_max; use uniform') as err:
        check_timesteps('second_moment', PairStream([0.0, 0.1], LogNormal(), batch=4, **limits))
    assert '\n' not in err.value.message
    with pytest.raises(UserError, match='all images are noisy'):
        check_timesteps('second_moment', PairStream([0.2, 0.1], LogNormal(), batch=4, **limits))
