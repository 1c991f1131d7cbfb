"""Preference pairs out of the scores that completions have anyway: which of a prompt's samples is preferred to which.

A completion's reward is the mean of its judge runs. Chosen are only completions that passed the threshold, rejected any that were judged.
"""

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import SpecmillError
from tasks.select import Candidates, PairConfig, passed

NO_PAIRS = "Lower select.pairs.margin, raise select.pairs.per_prompt or generate.n, or look at the funnel."


def require_pairs(manifest: dict[str, Any], config: PairConfig) -> None:
    """Raises SpecmillError when a dataset has no pairs to prefer."""
    if not manifest["preferences"]:
        raise SpecmillError(f"dpo: of no prompt do two completions differ by {config.margin:g} in their mean scores. {NO_PAIRS}")


def pairs(found: Candidates, config: PairConfig) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of chosen and of rejected completions, in the order of the prompts."""
    chosen: list[int] = []
    rejected: list[int] = []
    for index, rewards, good in _of_prompts(found) if config.per_prompt else ():
        count = 0
        for best, worst in _matched(index, rewards, good, config, found):
            if count < config.per_prompt and good[best] and rewards[best] - rewards[worst] >= config.margin:
                chosen.append(int(index[best]))
                rejected.append(int(index[worst]))
                count += 1
    return np.array(chosen, np.int64), np.array(rejected, np.int64)


def mean_scores(scores: npt.NDArray[np.int8]) -> npt.NDArray[np.float64]:
    """Mean of the judge runs that were made, NaN where there is none or one has no score; a run may have settled the matter early."""
    made = scores > 0
    count, total = made.sum(axis=1, dtype=np.int16), np.where(made, scores, 0).sum(axis=1, dtype=np.int16)
    with np.errstate(invalid="ignore"):
        means = total / count
    means[(scores < 0).any(axis=1)] = np.nan
    return np.asarray(means, np.float64)


def _of_prompts(found: Candidates) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]]:
    """The judged completions of each prompt that has several, by sample: their indices, their rewards and which of them passed."""
    order = np.lexsort((found.sample, found.prompt))
    rewards = mean_scores(found.scores)[order]
    index, rewards = order[~np.isnan(rewards)], rewards[~np.isnan(rewards)]
    good, prompt = passed(found)[index], found.prompt[index].astype(np.int64)
    borders = np.flatnonzero(np.diff(prompt, prepend=-1, append=-1))
    for start, end in pairwise(borders):
        if end - start > 1:
            yield index[start:end], rewards[start:end], good[start:end]


def _matched(
    index: npt.NDArray[np.int64], rewards: npt.NDArray[np.float64], good: npt.NDArray[np.bool_], config: PairConfig, found: Candidates
) -> Iterator[tuple[int, int]]:
    """Pairs (better, worse) of a prompt's completions, as places in `index`."""
    if config.sampling == "extremes":
        left = np.argsort(-rewards, kind="stable").tolist()
        while best := [one for one in left[:-1] if good[one]]:
            yield best[0], left.pop()
            left.remove(best[0])
    else:
        accepted = _accepted(index, rewards, config, found)
        for first, second in zip(accepted[0::2], accepted[1::2], strict=False):
            yield (first, second) if rewards[first] >= rewards[second] else (second, first)


def _accepted(index: npt.NDArray[np.int64], rewards: npt.NDArray[np.float64], config: PairConfig, found: Candidates) -> list[int]:
    """Statistical rejection sampling (Liu et al., arXiv 2309.06657, section 3.1 and algorithm 1): as many completions as pairs need.

    Goes through those that are left, as often as it takes, and accepts each with probability exp((r - r_max) / beta), r_max being the
    largest reward that is left. Chance is a hash of prompt and sample: the same completions give the same pairs.
    """

    def chance(one: int, turn: int) -> float:
        name = f"{found.prompt[index[one]]}/{found.sample[index[one]]}/{turn}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / 2**56

    left, accepted, turn = sorted(range(len(index)), key=lambda one: chance(one, 0)), list[int](), 0
    while left and len(accepted) < 2 * config.per_prompt:
        best, turn = max(rewards[left]), turn + 1
        taken = [one for one in left if chance(one, turn) < np.exp((rewards[one] - best) / config.rso_beta)]
        accepted += taken
        left = [one for one in left if one not in taken]
    return accepted[: 2 * config.per_prompt]
