# SPDX-License-Identifier: Apache-2.0
"""Walks along a list of images: each level in turn takes the next position whose image may be used at it."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from training.data.limits import Limits

GROUPS = 64  # groups of levels, each with a table: more groups make a block more expensive, and a pair cheaper
RETRIES = 0.2  # acceptable number of positions per pair that are looked up in vain; allows fewer groups


class Walks:
    """Finds positions for levels, whatever the images' limits (Limits), at a cost of about one look-up per pair.

    Levels are grouped by the limits that they lie between. If the images have few different limits, all levels of a group allow the
    same images, and a table of the next such position is sufficient. If they have many, the table gives the next position that some
    level of the group allows, and the image's own limits decide."""

    def __init__(self, limits: Limits):
        low, high = limits.intervals()
        self.edges, self.exact = _edges(low, high)
        self.limits = limits
        # An image may be used at some levels of the groups from `first` to `last`, and of those from `again` on.
        never = len(self.edges) + 1
        first = torch.where(limits.empty(), never, self._group_above(limits.bar))
        last = first if limits.top is None else torch.searchsorted(self.edges, limits.top)
        again = first if limits.floor is None else torch.where(limits.floor.isinf(), never, self._group_above(limits.floor))
        self._first, self._last, self._again = (column.to(torch.int8).numpy() for column in (first, last, again))
        # What decides within a group: nothing, the bars alone, or all limits.
        unlimited = torch.full_like(limits.bar[:1], math.inf).expand(limits.bar.shape)
        own = [] if self.exact else limits[:1] if limits.top is None else [unlimited if limit is None else limit for limit in limits]
        self._own = [limit.numpy() for limit in own]

    def _group_above(self, bar):
        """The group of the levels just above each bar."""
        return torch.searchsorted(self.edges, bar, right=True)

    def groups(self, sigma: np.ndarray) -> np.ndarray:
        """The group of each level, int64 [k]; sigma: float64 [k], NumPy."""
        return np.searchsorted(self.edges.numpy(), sigma)

    def block(self, images: np.ndarray) -> 'Block':
        """The Block of consecutive positions of the list, with the images int64 [n]."""
        group = np.arange(len(self.edges) + 1, dtype=np.int8)[:, None]
        fine = self._first[images] <= group
        if self.limits.top is not None:
            fine &= self._last[images] >= group
        if self.limits.floor is not None:
            fine |= self._again[images] <= group
        return Block(images, fine, [limit[images] for limit in self._own])


class Block:
    """Positions of the list that are processed together.

    fine: bool [groups, n]. limits: those that are checked in addition, float64 [n] each: none; bar; or bar, top and floor."""

    def __init__(self, images: np.ndarray, fine: np.ndarray, limits: Sequence[np.ndarray]):
        self.images = images
        # A position behind the end is fine for every level. Bytes are searched at the speed of memory.
        self._next = [(row.tobytes() + b'\1').find for row in fine]
        self._limits = [memoryview(np.append(limit, end)) for limit, end in zip(limits, (-1.0, math.inf, math.inf))]

    def walk(self, place: int, groups: Sequence[int], levels: Sequence[float]) -> np.ndarray:
        """Positions for levels and their groups, two lists, from `place` on, until levels or block end: int64 [j], ascending."""
        end, found, finds = len(self.images), [], map(self._next.__getitem__, groups)
        if not self._limits:
            for find in finds:
                place = find(1, place) + 1
                if place > end:
                    break
                found.append(place)
        elif len(self._limits) == 1:
            bar, = self._limits
            for find, level in zip(finds, levels):
                place = find(1, place)
                while bar[place] >= level:
                    place = find(1, place + 1)
                place += 1
                if place > end:
                    break
                found.append(place)
        else:
            bar, top, floor = self._limits
            for find, level in zip(finds, levels):
                place = find(1, place)
                while not (bar[place] < level <= top[place] or level > floor[place]):
                    place = find(1, place + 1)
                place += 1
                if place > end:
                    break
                found.append(place)
        return np.array(found, np.int64) - 1


def _edges(low, high):
    """(edges of the groups of levels, ascending; whether the images that a level may have are the same throughout a group)."""
    edges = torch.cat([low, high]).unique()
    edges = edges[edges.isfinite()]
    if len(edges) <= GROUPS:
        return edges, True
    at = lambda limit: torch.searchsorted(edges, limit.sort().values.contiguous())
    started, ended = (torch.bincount(at(limit), minlength=len(edges) + 1)[:len(edges)] for limit in (low, high))
    above = (started - ended).cumsum(0)  # number of images that may be used just above an edge
    below = above - started + ended
    # Images that start or end within a group, as shares of those present: the number of positions looked up in vain.
    vain = (started / above.clamp(min=1) + ended / below.clamp(min=1)).cumsum(0)
    group = (vain / max(RETRIES, vain[-1].item() / GROUPS)).floor()
    return edges[torch.cat([group.new_ones(1), group.diff()]) > 0], False
