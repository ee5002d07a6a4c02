"""Learn a byte-level BPE vocabulary from text and save it as a Hugging Face tokenizer.json."""

import sys
import time

from jaxgpt import config, files
from jaxgpt.config import TokenizerConfig


def main() -> None:
    cfg = config.parse(TokenizerConfig, __doc__ or "", config.join_lists(sys.argv[1:], "--input"))
    from jaxgpt.data import documents, token_files, tokenizer

    start = time.perf_counter()
    output = files.path(cfg.output)
    if output.is_dir():
        raise ValueError(f"output={output}: is a folder; name a file in it")
    files.make_folder(output.parent)
    text = documents.Corpus(
        tuple(cfg.input), val_fraction=0.0, errors=cfg.errors, column=cfg.column
    )
    trained = tokenizer.train_bpe(token_files.sample(text, cfg.max_characters), cfg.vocab_size)
    trained.save(output)
    seconds = time.perf_counter() - start
    print(f"{output}: {trained.vocab_size:,} ids, {seconds:.1f} s")
    if trained.vocab_size < cfg.vocab_size:
        print(f"the text has no more pairs: fewer ids than vocab_size={cfg.vocab_size:,}")
