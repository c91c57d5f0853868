import logging

import pytest


@pytest.fixture(autouse=True)
def _loggers_as_they_were():
    """The commands quieten Lightning's loggers for good; tests of other rooms read what these say."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    loggers.append(logging.getLogger("pytorch_lightning.utilities.rank_zero"))
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
