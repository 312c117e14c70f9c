"""How long a processor works, which does not depend on what else it does."""

import os
import resource
from contextlib import contextmanager
from unittest import mock


@contextmanager
def a_minute_of_one_core():
    """For what other processes do: seconds of a core, however busy it is. They compute with one thread, as a second
    one's waiting would count, too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
