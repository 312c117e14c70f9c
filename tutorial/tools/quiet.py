"""Keeps the libraries' bars and hints out of a lesson: its outputs are what the lesson prints."""

import logging

import datasets
import transformers


def quiet() -> None:
    """Nothing but errors from here on."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
