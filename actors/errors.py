"""What a user can mend about a model or a text, as against what we got wrong."""


class InputError(ValueError):
    """A model or a corpus can't be used as given; the message says what to do."""
