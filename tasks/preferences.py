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
    good, rewards = passed(found), mean_scores(found.scores)
    for index in _of_prompts(found, rewards) if config.per_prompt else ():
        accepted = index if config.sampling == "extremes" else _accepted(index, rewards, config, found)
        count = 0
        for best, worst in _matched(accepted, rewards, good, config):
            if count < config.per_prompt and good[best] and rewards[best] - rewards[worst] >= config.margin:
                chosen.append(best)
                rejected.append(worst)
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


def _of_prompts(found: Candidates, rewards: npt.NDArray[np.float64]) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of the judged completions of each prompt that has several, by sample."""
    judged = ~np.isnan(rewards)
    count = np.zeros(int(found.prompt.max(initial=0)) + 1, np.uint16)
    np.add.at(count, found.prompt[judged], 1)
    judged = np.flatnonzero(judged & (count > 1)[found.prompt])
    order = judged[np.lexsort((found.sample[judged], found.prompt[judged]))]
    borders = np.flatnonzero(np.diff(found.prompt[order], prepend=-1, append=-1))
    for start, end in pairwise(borders if len(order) else ()):
        yield order[start:end]


def _matched(
    index: npt.NDArray[np.int64], rewards: npt.NDArray[np.float64], good: npt.NDArray[np.bool_], config: PairConfig
) -> Iterator[tuple[int, int]]:
    """Pairs (better, worse) of a prompt's completions."""
    if config.sampling == "extremes":
        left = index[np.argsort(-rewards[index], kind="stable")].tolist()
        while best := [one for one in left[:-1] if good[one]]:
            yield best[0], left.pop()
            left.remove(best[0])
    else:
        for first, second in zip(index[0::2], index[1::2], strict=False):
            best, worst = (first, second) if rewards[first] >= rewards[second] else (second, first)
            yield int(best), int(worst)


def _accepted(
    index: npt.NDArray[np.int64], rewards: npt.NDArray[np.float64], config: PairConfig, found: Candidates
) -> npt.NDArray[np.int64]:
    """Statistical rejection sampling (Liu et al., arXiv 2309.06657, section 3.1 and algorithm 1): as many completions as pairs need.

    Goes through those that are left, as often as it takes, and accepts each with probability exp((r - r_max) / beta), r_max being the
    largest reward that is left. Chance is a hash of prompt and sample: the same completions give the same pairs.
    """

    def chance(one: np.int64, turn: int) -> float:
        name = f"{found.prompt[one]}/{found.sample[one]}/{turn}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / 2**56

    left, accepted, turn = sorted(index, key=lambda one: chance(one, 0)), list[np.int64](), 0
    while left and len(accepted) < 2 * config.per_prompt:
        best, turn = max(rewards[left]), turn + 1
        taken = [one for one in left if chance(one, turn) < np.exp((rewards[one] - best) / config.rso_beta)]
        accepted += taken
        left = [one for one in left if one not in taken]
    return np.array(accepted[: 2 * config.per_prompt], np.int64)
