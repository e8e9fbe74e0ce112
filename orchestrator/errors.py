"""What a user can mend, as against what we got wrong."""


class UserError(ValueError):
    """Something the user gave can't be used; the message says what is, what was allowed, what to do.

    The command line prints the message alone and exits with 2. `actors.errors.InputError` and
    `storage.errors.StoreError` are treated the same way.
    """
