"""Turn text files, folders, JSONL, Parquet or Hub data sets into token files for pretrain.py."""

import sys
import time

from jaxgpt import config
from jaxgpt.config import PrepareConfig


def main() -> None:
    cfg = config.parse(PrepareConfig, __doc__ or "", config.join_lists(sys.argv[1:], "--input"))
    from jaxgpt.config import idle
    from jaxgpt.data import documents, token_files, tokenizer

    for line in idle.of_preparation(cfg):
        print(f"warning: {line}", file=sys.stderr)

    start = time.perf_counter()
    text = documents.Corpus(
        tuple(cfg.input), cfg.val_fraction, cfg.errors, cfg.column, cfg.hub_split, cfg.hub_config
    )
    chosen = tokenizer.load(cfg.tokenizer)
    manifest = token_files.write_tokens(text, chosen, cfg.output, cfg.tokenizer, cfg.shard_tokens)
    parts = [
        f"{name} {split['tokens']:,} tokens in {max(split['documents'], 1):,} documents"
        for name, split in (("train", manifest["train"]), ("held out", manifest["val"]))
        if split["tokens"]
    ]
    tokens = manifest["train"]["tokens"] + manifest["val"]["tokens"]
    print(
        f"{cfg.output}: {', '.join(parts)}, {manifest['text_bytes'] / tokens:.2f} bytes per token, "
        f"{time.perf_counter() - start:.1f} s"
    )
