"""Notes: chapters of prose whose code runs and whose quotes are the package as it is today."""
