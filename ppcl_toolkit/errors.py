"""The one exception that a user sees."""


class PpclError(Exception):
    """A user's mistake, or the machine's: one sentence with the value, the rule and the choices."""
