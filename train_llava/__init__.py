"""Build, train and use one's own LLaVA: `python -m train_llava.COMMAND`, or installed `train-llava COMMAND`.

A command is imported when it is named, not before: PyTorch alone takes seconds.
"""

import logging
import os
import sys
import warnings
from importlib import import_module

__version__ = "0.1.0"

# at its import bitsandbytes reports each fast kernel of its own that is not there, matplotlib a home without a cache
for name in ("bitsandbytes", "matplotlib"):
    logging.getLogger(name).setLevel(logging.ERROR)
# what transformers tells programmers about its next versions
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers", append=True)
# DeepSpeed reports at its import that it runs on a CPU; a training's warnings of it go to launch.log (run_log.py)
logging.getLogger("DeepSpeed").addFilter(
    lambda record: not record.getMessage().startswith("Setting accelerator to CPU")
)
# Pillow keeps up to 64 freed blocks of 1 MB for its next images: fresh memory from the system would cost a third of the
# time of decoding and resizing a small image, in page faults. It reads these when it is first imported.
os.environ.setdefault("PILLOW_BLOCK_SIZE", "1m")
os.environ.setdefault("PILLOW_BLOCKS_MAX", "64")

COMMANDS = {
    "build_model": "makes a LLaVA of a CLIP and a chat model",
    "train": "trains it",
    "infer": "asks it about images",
    "app": "opens a web page on which others ask it",
    "evaluate": "scores it on held-out data",
    "merge_lora": "makes one model of an adapter and its base",
    "export": "writes it for llama.cpp, Ollama or vLLM",
    "check_data": "reads all data and says what is wrong with it",
    "show_batch": "shows what the model gets, as a web page",
    "estimate": "says what a training will need: memory, disk, hours",
}
NAME = "train-llava"


def usage() -> str:
    """What there is to type, a line for each command."""
    lines = [f"usage: {NAME} COMMAND [FLAGS]", "", *(f"  {name:<13}{what}" for name, what in COMMANDS.items()), ""]
    return "\n".join([*lines, f"{NAME} COMMAND --help lists a command's flags; {NAME} --version prints the version."])


def main() -> None:
    """Runs the command that is named first, with the rest as its flags; exit code 2 if there is none of this name."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        sys.argv = [f"{NAME} {name}", *flags]  # what the command's own --help calls it
        import_module(f"train_llava.{name}").main()
    else:
        print(f"error: no command {name!r}. There are {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
