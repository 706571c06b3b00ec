"""Where a reward of your own finds what it needs: `from vise_fast.rewards import Evidence, Parts,
register`.

A file given as `--reward.plugin FILE` registers functions; `--reward.name NAME` chooses one. This
module keeps its place and its names whatever moves inside the package; the rewards themselves are
in method/rewards.py.
"""

from vise_fast.method.evidence import Evidence
from vise_fast.method.rewards import Parts, Scores, agreement, register

__all__ = ["Evidence", "Parts", "Scores", "agreement", "register"]
