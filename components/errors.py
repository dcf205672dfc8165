"""Errors that a user can mend. Anything else that is raised is a defect of ours."""


class SlateloopError(Exception):
    """Base of the errors whose text is meant for the user: shown without a traceback."""


class InputError(SlateloopError):
    """What the user gave is wrong: a path, a configuration key, a log. The command line exits with 2.

    The text names the file, column, row or key, the value seen and what was expected.
    """


class ContractError(InputError):
    """A log does not keep the data contract (`components.interactions.contract`)."""


class TooManyBadRowsError(InputError):
    """Validation quarantined more than the configured share of rows: nothing may be trained on this log."""
