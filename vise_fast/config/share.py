"""One rank's share of a run, as a configuration: fewer images, a GPU of its own."""

from __future__ import annotations

from vise_fast.config.schema import Config
from vise_fast.ranks import part
from vise_fast.ranks.ranks import Ranks
from vise_fast.system.errors import ConfigError


def share(config: Config, ranks: Ranks) -> Config:
    """What this rank does of every step; the configuration itself where it is the only one.

    Raises ConfigError where some rank would have nothing to do.
    """
    mine = of_one(config, ranks.count)
    if ranks.count == 1:
        return config
    mine.train.batch = len(ranks.part(config.train.batch))
    mine.train.micro_batch = min(mine.train.micro_batch, mine.train.batch)
    if ranks.cuda is not None and config.model.device in ("auto", "cuda"):
        mine.model.device = f"cuda:{ranks.cuda}"
    return mine


def of_one(config: Config, count: int) -> Config:
    """The largest share among so many ranks: what each must have memory for. Raises ConfigError."""
    if count == 1:
        return config
    images = config.train.batch
    if count > images:
        raise ConfigError(
            f"{count} ranks share batches of {images} images, so some would have nothing to do; "
            f"start {images} at most, or raise --train.batch"
        )
    mine = config.model_copy(deep=True)
    mine.train.batch = part.largest(images, count)
    mine.train.micro_batch = min(mine.train.micro_batch, mine.train.batch)
    return mine
