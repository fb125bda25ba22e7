# SPDX-License-Identifier: Apache-2.0
"""Penalties rho(e): what an error costs, elementwise, before the weight and the sum over an image."""


def squared(error, sigma):
    """e^2, whose minimiser is the conditional mean. error: [N,C,H,W]; sigma: [N,1,1,1], which this penalty does not need."""
    return error.square()


PENALTIES = {'squared': squared}
