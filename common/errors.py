"""Errors that a user can cause and repair; the entry points print them without a traceback and exit with code 2."""


class QuintetError(ValueError):
    """Base of the errors below: the message names the option or file, the value got, the reason and the remedy."""


class ConfigError(QuintetError):
    """An option (configuration key or function argument) has a value that cannot work."""


class DataError(QuintetError):
    """An input file, dataset or tokenizer is missing, damaged or does not fit the run."""


class CheckpointError(QuintetError):
    """A checkpoint or weight file is missing, damaged, or belongs to another model or configuration."""
