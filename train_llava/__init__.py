"""Build, train and use one's own LLaVA."""

import logging
import os

__version__ = "0.1.0"

# at its import bitsandbytes reports each fast kernel of its own that is not there
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# DeepSpeed reports at its import that it runs on a CPU; a training's warnings of it go to launch.log (run_log.py)
logging.getLogger("DeepSpeed").addFilter(
    lambda record: not record.getMessage().startswith("Setting accelerator to CPU")
)
# Pillow keeps up to 64 freed blocks of 1 MB for its next images: fresh memory from the system would cost a third of the
# time of decoding and resizing a small image, in page faults. It reads these when it is first imported.
os.environ.setdefault("PILLOW_BLOCK_SIZE", "1m")
os.environ.setdefault("PILLOW_BLOCKS_MAX", "64")
