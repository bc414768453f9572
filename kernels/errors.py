"""Errors that a user can cause and correct. Entry points print them as one line, without a traceback."""


class MetronomeError(Exception):
    """The base class: something outside the program is wrong. The message says what, where, and what to do."""


class StaleWeightsError(MetronomeError):
    """An op was given packed weights that are older than the parameters they were made from."""
