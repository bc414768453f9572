"""The base of every error that a user can cause and mend; entry points print it as one line, without a traceback."""


class MetronomeError(Exception):
    """Something outside the program is wrong. The message says what, where, and what to do."""


class StaleWeightsError(MetronomeError):
    """An op was given packed weights that are older than the parameters they were made from."""
