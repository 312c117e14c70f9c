"""Build, train and use one's own LLaVA."""

import logging

# at its import it reports each fast kernel of its own that is not there
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
