"""How long a processor works, which does not depend on what else it does."""

import resource
from contextlib import contextmanager


@contextmanager
def a_minute_of_one_core():
    """For what other processes do: seconds of a core, however busy it is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
