"""Which rows of a flattened batch (batch x length) hold answers and images.

The collator works this out on the CPU. On a GPU the model would have to wait for its own numbers to find out.
"""

import torch

from train_llava.processing.chat import IGNORE_INDEX


def rows_of_answers(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (batch, length) -> the rows at which a token is to be predicted, and these tokens: both (answers,)."""
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    rows = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return rows, following[rows]


def rows_of_images(input_ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Ids (batch, length) -> the rows of image tokens, in the order of the images' features: (image tokens,)."""
    return (input_ids == image_token_id).flatten().nonzero().squeeze(1)
