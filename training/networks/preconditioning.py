# SPDX-License-Identifier: Apache-2.0
"""Preconditioners: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), with F a U-Net; Karras et al. 2022, table 1."""

import inspect
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dnnlib import UserError, text_record
from torch_utils import misc
from training.diffusion import discrete
from training.networks.autoencoder import described
from training.networks.interface import network_class


class Precond(nn.Module):
    """A denoiser: net(x, sigma, class_labels=None, augment_labels=None) -> D = E[x_0 | x], float32 [N,C,H,W].

    x [N,C,H,W]; sigma, the noise's std: 0-dim, [N] or [N,1,1,1]; both are taken as float32. F runs in compute_dtype, by default
    float16 (on a GPU only) where the configuration says use_fp16, and float32 elsewhere; its first and last layer and its embeddings
    in float32 (see Network): c_in x rounded to bfloat16 would lose 43 % of the noise at sigma 0.002. class_labels [N, label_dim], one-hot;
    None and all-zero rows mean "no label". augment_labels [N, augment_dim]; None means "not augmented".
    Constructor: the published arguments, by name: img_resolution (int or [H, W]), img_channels, label_dim=0, use_fp16=False,
    model_type, those in `options`, and the network's own. `config` holds those that were given.
    A preconditioner defines `options`, prepare() and coefficients()."""

    options = {}                # its own constructor arguments, with their defaults; each becomes an attribute
    model_type = 'SongUNet'     # the default network
    output_multiple = 1         # output channels of F per channel of the image
    gives_variance = False      # whether the further channels were trained as the variance of a sampling step, see discrete.py
    times = 1.0, 0.0            # factor and offset that map c_noise to times from 0 to about 1000, for networks that take these
    sigma_data = 0.5            # std of the data, for pieces of the objective that need it
    row_draws = None            # in a training run: see rows.attach_row_draws()
    precision = None            # in which it was trained, of misc.PRECISIONS; None: fp32, or not told

    def __init__(self, img_resolution: int | Sequence[int], img_channels: int, label_dim: int = 0, use_fp16: bool = False,
                 model_type: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        for name, default in self.options.items():
            setattr(self, name, kwargs.pop(name, default))
        self.prepare()
        self.model = network_class(model_type or self.model_type)(img_resolution, img_channels, img_channels * self.output_multiple,
                                                                  label_dim=label_dim, **kwargs)
        self.compute_dtype = torch.float16 if use_fp16 else torch.float32
        self.augment_dim = self.model.augment_dim
        self.units = self.sampling = self.autoencoder = self.text = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """As Network.compute_dtype."""
        return self.model.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self.model.compute_dtype = dtype

    def prepare(self) -> None:
        """Sets attributes that follow from `options`, before the network is built."""

    def hold_text(self, record: dict | None) -> None:
        """Takes labels that were made of captions; record: `text` of config.json, see dnnlib.text_record. "No label" then is a label of
        its own, that of the empty caption. Raises ValueError."""
        if record is None:
            return
        self.text = text_record.checked(record)
        if text_record.label_dim(self.text) != self.label_dim:
            raise ValueError(f'its captions have labels of {text_record.label_dim(self.text)} numbers, and label_dim={self.label_dim}')
        if self.model.label_embedding is None:
            raise ValueError(f'captions need an embedding of labels, and {type(self.model).__name__} has none')
        self.model.label_embedding.hold_null_label(self.label_dim)

    @torch.no_grad()
    def set_null_label(self, label: torch.Tensor) -> None:
        """Sets the label of the empty caption, [label_dim]."""
        self.model.label_embedding.null_label.copy_(label)

    def coefficients(self, sigma: torch.Tensor) -> tuple:
        """sigma [N,1,1,1] -> c_skip, c_out, c_in, c_noise."""
        raise NotImplementedError

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The nearest noise level of the network; sigma itself, where all levels are allowed."""
        return torch.as_tensor(sigma)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.outputs(x, sigma, class_labels, augment_labels)[0]

    def outputs(self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None,
                augment_labels: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(D [N,C,H,W], further channels of F [N, (output_multiple - 1) C, H, W]), both float32."""
        if self.training and self.row_draws is not None:
            self.row_draws.next_call()
        x = x.float()
        if self.model.channels_last:  # here, so that the result, and with it its gradient, lies in memory as the network wants it
            x = x.contiguous(memory_format=torch.channels_last)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        if self.model.takes_levels:
            c_noise = sigma.log() / 4
        elif self.model.takes_times:
            c_noise = c_noise * self.times[0] + self.times[1]
        inner = c_in * x
        if not self.model.float32_ends:
            inner = inner.to(self.model.inner_dtype(inner))
        F_x = self.model(inner, c_noise.flatten(), self._labels(class_labels, x), augment_labels).float()
        F_x, rest = F_x[:, :self.img_channels], F_x[:, self.img_channels:]
        return c_skip * x + c_out * F_x, rest

    def _labels(self, class_labels, x):
        if not self.label_dim:
            return None
        if class_labels is None:
            # One row per image in training, where each row has its own draws of label dropout and perturbation.
            return torch.zeros([len(x) if self.training else 1, self.label_dim], device=x.device)
        if class_labels.shape[-1] != self.label_dim:
            raise ValueError(f'class_labels of shape {list(class_labels.shape)}: this network has label_dim={self.label_dim}, '
                             f'so the labels must be one-hot rows of that width')
        return class_labels.to(x.device, torch.float32).reshape(-1, self.label_dim)


class EDMPrecond(Precond):
    """EDM: c_skip, c_out and c_in give the network's input and training target unit variance for data of std sigma_data (Karras et al.
    2022, table 1)."""

    options = {'sigma_min': 0.0, 'sigma_max': math.inf, 'sigma_data': 0.5}
    model_type = 'DhariwalUNet'
    times = 250.0, 500.0  # ln(sigma) from -8 to 8

    def coefficients(self, sigma: torch.Tensor) -> tuple:
        return *predict_edm(sigma, self.sigma_data), sigma.log() / 4


class VPPrecond(Precond):
    """Variance-preserving (Song et al. 2021): the network predicts the noise and is conditioned on the time t in [epsilon_t, 1], scaled by
    M - 1."""

    options = {'beta_d': 19.9, 'beta_min': 0.1, 'M': 1000, 'epsilon_t': 1e-5}

    def prepare(self) -> None:
        self.sigma_min, self.sigma_max = (float(self.sigma(torch.tensor(t, dtype=torch.float64, device='cpu')))
                                          for t in (self.epsilon_t, 1.0))

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise level at time t: sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
        return torch.expm1(self.beta_d * t ** 2 / 2 + self.beta_min * t).sqrt()

    def sigma_inv(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time at which the noise level is sigma."""
        return ((self.beta_min ** 2 + 2 * self.beta_d * torch.log1p(sigma ** 2)).sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: torch.Tensor) -> tuple:
        return 1, -sigma, 1 / (sigma ** 2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


class VEPrecond(Precond):
    """Variance-exploding (Song et al. 2021): the network sees the unscaled image, predicts the noise, and is conditioned on
    ln(sigma / 2)."""

    options = {'sigma_min': 0.02, 'sigma_max': 100.0}
    times = 62.5, 500.0  # ln(sigma / 2) from -8 to 8

    def coefficients(self, sigma: torch.Tensor) -> tuple:
        return 1, sigma, 1, (sigma / 2).log()


class iDDPMPrecond(Precond):
    """Improved DDPM (Nichol & Dhariwal 2021): discrete noise levels u_0 > ... > u_M = 0, and C further output channels for the variance
    of the reverse step.

    By default the published cosine schedule, whose timesteps are M - 1 - j. diffusion: a schedule of discrete.py, such as
    "cosine:steps=4000", whose T levels are then used; the network is conditioned on its timestep t = T - 1 - j as t * 1000 / T.
    learned_variance: whether there are channels for the variance. prediction: what F predicts, one of PREDICTIONS; by default the noise,
    as published. time_offset: added to the time on which the network is conditioned; 1 for networks whose times begin at 1. outputs()
    returns D and the channels for the variance."""

    options = {'C_1': 0.001, 'C_2': 0.008, 'M': 1000, 'diffusion': None, 'learned_variance': True, 'prediction': 'eps', 'sigma_data': 0.5,
               'time_offset': 0.0}
    model_type = 'DhariwalUNet'

    def prepare(self) -> None:
        _check('prediction', self.prediction, PREDICTIONS)
        self.output_multiple = 2 if self.learned_variance else 1
        self.gives_variance = self.learned_variance and self.diffusion is not None
        self.time_scale = 1.0
        if self.diffusion is None:
            u = published_levels(self.M, self.C_1, self.C_2).numpy()
        else:
            diffusion = discrete.build_diffusion(self.diffusion, 'network configuration: diffusion')
            u, self.M = np.append(diffusion.levels.flip(0).numpy(), 0.0), diffusion.steps
            self.time_scale = discrete.TRAINED_TIMES / diffusion.steps
        # Levels that follow from `diffusion` are not saved with the weights, which may be used in a network with another diffusion.
        self.register_buffer('u', torch.tensor(u, dtype=torch.float32), persistent=self.diffusion is None)

    @property
    def sigma_min(self) -> float:
        """The lowest level, as stored: weights may bring levels of their own."""
        return float(self.u[self.M - 1])

    @property
    def sigma_max(self) -> float:
        """The highest level, as stored."""
        return float(self.u[0])

    def own_diffusion(self) -> discrete.Diffusion:
        """The Diffusion whose levels these are."""
        if self.diffusion is not None:
            return discrete.build_diffusion(self.diffusion)
        return discrete.Cosine(self.M, s=self.C_2, largest=1 - self.C_1)

    def round_sigma(self, sigma: torch.Tensor | float, return_index: bool = False) -> torch.Tensor:
        """The nearest level of u, with sigma's shape and dtype, or its index."""
        sigma = torch.as_tensor(sigma)
        index = (self.u - sigma.to(self.u).reshape(-1, 1)).abs().argmin(dim=1).reshape(sigma.shape)
        return index if return_index else self.u[index].to(sigma.dtype)

    def coefficients(self, sigma: torch.Tensor) -> tuple:
        t = self.M - 1 - self.round_sigma(sigma, return_index=True).float()
        return *PREDICTIONS[self.prediction](sigma, self.sigma_data), t * self.time_scale + self.time_offset


def published_levels(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> torch.Tensor:
    """The levels u_0 > ... > u_M = 0 of iDDPMPrecond without a `diffusion`, float64 [M + 1] (Karras et al. 2022, appendix C.3.4)."""
    alpha_bar = np.sin(0.5 * np.pi * np.arange(M + 1) / (M * (C_2 + 1))) ** 2
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1)
    return torch.from_numpy(u)


def predict_edm(sigma: torch.Tensor, sigma_data: float) -> tuple:
    """EDM's preconditioning, which gives the network's input and target unit variance for data of std sigma_data (Karras et al. 2022,
    appendix B.6).

    sigma: [N,1,1,1]. Returns c_skip, c_out, c_in of that shape. As sigma grows, D tends to sigma_data F, which is bounded; D of
    predict_eps is not."""
    total = sigma ** 2 + sigma_data ** 2  # variance of x
    return sigma_data ** 2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


def predict_eps(sigma: torch.Tensor, sigma_data: float) -> tuple:
    """The noise eps, with D = x - sigma F (Ho et al. 2020): D has sigma times the error of the network.

    Returns c_skip, c_out, c_in."""
    return 1, -sigma, 1 / (sigma ** 2 + 1).sqrt()


def predict_v(sigma: torch.Tensor, sigma_data: float) -> tuple:
    """The velocity v = sqrt(abar) eps - sqrt(1 - abar) x_0, where abar = 1 / (1 + sigma^2) (Salimans & Ho 2022).

    D = sqrt(abar) x_t - sqrt(1 - abar) F with x_t = sqrt(abar) x; with F negated this is predict_edm at sigma_data = 1.
    Returns c_skip, c_out, c_in."""
    c_in = 1 / (sigma ** 2 + 1).sqrt()
    return c_in ** 2, -sigma * c_in, c_in


def predict_x0(sigma: torch.Tensor, sigma_data: float) -> tuple:
    """The image x_0 itself: D = F (Ho et al. 2020, section 3.2), so D has the error of the network at every level.

    Returns c_skip, c_out, c_in."""
    return 0, 1, 1 / (sigma ** 2 + 1).sqrt()


def build_network(config: dict) -> Precond:
    """The network of a configuration, with initial weights drawn from torch's random state (see misc.seeded).

    config: the published constructor arguments (see Precond), "precond" if it is not edm, "units" ({"offset", "scale"}) if the data is
    not 8-bit, "sampling" if the default sampler is not EDM's (see sampling/options.py), "autoencoder" if the data is latents
    ({"ref", "range", "sha256" unless unknown}, see autoencoder.py), "text" (see dnnlib.text_record) if its labels are captions, and
    "precision" if it was not trained in fp32. The attribute `config` of the result equals it without "precision", in JSON types and
    without infinities, which are the defaults.
    Raises UserError, in one line, for unknown names and for values that the network refuses."""
    config = {key: value for key, value in json.loads(json.dumps(config)).items() if value not in (math.inf, -math.inf)}
    precision = config.pop('precision', None)
    kwargs = dict(config)
    name, units, sampling = kwargs.pop('precond', 'edm'), kwargs.pop('units', None), kwargs.pop('sampling', None)
    autoencoder, text = _autoencoder(kwargs.pop('autoencoder', None)), kwargs.pop('text', None)
    _check('precond', name, PRECONDS)
    _check('precision', precision, [None, *misc.PRECISIONS])
    kind = PRECONDS[name]
    model_type = kwargs.get('model_type', kind.model_type)
    allowed = _constructor_arguments(kind, model_type)
    for key in kwargs:
        _check('argument', key, allowed)
    for key in ('img_resolution', 'img_channels'):
        if key not in kwargs:
            raise UserError(f'network configuration: "{key}" is missing')
    try:
        net = kind(**kwargs)
    except (ValueError, TypeError) as err:
        raise UserError(f'network configuration: {err}') from None
    try:
        net.hold_text(text)
    except ValueError as err:
        raise UserError(f'network configuration: "text": {err}') from None
    net.config, net.units, net.sampling, net.autoencoder, net.precision = config, units, sampling, autoencoder, precision
    return net


def _autoencoder(value):
    try:
        return None if value is None else described(value)
    except ValueError as err:
        raise UserError(f'network configuration: "autoencoder" {err}') from None


def _constructor_arguments(kind, model_type):
    names = [*inspect.signature(Precond.__init__).parameters, *kind.options, *inspect.signature(network_class(model_type)).parameters]
    return [name for name in dict.fromkeys(names) if name not in ('self', 'kwargs', 'in_channels', 'out_channels')]


def _check(what, name, choices):
    if name not in choices:
        raise UserError(f'network configuration: unknown {what} "{name}"; choose from {", ".join(filter(None, choices))}')


# What F predicts with discrete timesteps: (sigma [N,1,1,1], sigma_data) -> c_skip, c_out, c_in.
PREDICTIONS = {'edm': predict_edm, 'eps': predict_eps, 'v': predict_v, 'x0': predict_x0}
PRECONDS = {'edm': EDMPrecond, 'iddpm': iDDPMPrecond, 've': VEPrecond, 'vp': VPPrecond}
