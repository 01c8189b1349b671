"""A verb for tests of what surrounds every verb."""


class FakeVerb:
    """Takes no flags and does what it is told."""

    def __init__(self, work):
        self._work = work

    def add_arguments(self, parser):
        pass

    def run(self, args):
        return self._work()
