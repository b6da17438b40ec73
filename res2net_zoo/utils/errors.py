"""What is raised for bad input."""


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""
