"""Log lines that tell users nothing about their run."""

import logging

TIPS = ("litlogger", "litmodels")
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.logger_connector.logger_connector",
)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not any(tip in record.getMessage() for tip in TIPS)


def quiet_trainer_tips() -> None:
    """Drop the two product tips that every Trainer prints; Lightning has no switch for them."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if _is_no_tip not in logger.filters:
            logger.addFilter(_is_no_tip)
