"""From text to batches: tokenizers, token files, packing, `batch(step)`."""
