"""What can befall a request to the store, and how often."""

import random
from dataclasses import dataclass


@dataclass
class Weather:
    """Chances of what can happen to a request to the store, and at a write in particular."""

    fail: float = 0.0
    lose_answer: float = 0.0
    unclear_conflict: float = 0.0
    delay: float = 0.0
    crash: float = 0.0
    interrupt: float = 0.0
    pause: float = 0.0
    outage: float = 0.0
    slow: float = 0.0
    lose_shard: float = 0.0
    damage_shard: float = 0.0
    engine_fails: float = 0.0
    give_up: float = 0.0

    @classmethod
    def drawn(cls, rng: random.Random) -> "Weather":
        """Some faults of the list, each as often as it comes: a schedule with few kinds of them goes deeper than one with all."""
        most = {
            "fail": 0.2, "lose_answer": 0.2, "unclear_conflict": 1.0, "delay": 0.1, "crash": 0.08, "interrupt": 0.03, "pause": 0.01,
            "outage": 0.004, "slow": 0.1, "lose_shard": 0.01, "damage_shard": 0.015, "engine_fails": 0.05, "give_up": 0.1,
        }  # fmt: skip
        return cls(**{name: rng.random() * top if rng.random() < 0.4 else 0.0 for name, top in most.items()})
