"""The kinds of failure that a person sees, and the exit code of each."""


class SpecmillError(Exception):
    """The run failed or a balance does not hold; exit code 1."""

    exit_code = 1


class UserError(SpecmillError):
    """The person who started the run has to change something; the message says what. Exit code 2."""

    exit_code = 2


class Diverged(SpecmillError):
    """A training run that has gone wrong for good: the same step would end the same way, so nobody tries it again."""
