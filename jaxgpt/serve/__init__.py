"""Serving: an engine that owns the device, OpenAI's API in front of it, and a page to talk to."""
