"""The network: one GPT whose families are settings of `ModelConfig`. Notes: chapters 3 to 5."""
