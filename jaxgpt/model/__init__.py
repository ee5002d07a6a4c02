"""The network: one GPT whose families are settings of `ModelConfig`."""
