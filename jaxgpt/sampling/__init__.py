"""Text from a model: prefill, a scanned decode, and how the next token is chosen.

Notes: chapter 10.
"""
