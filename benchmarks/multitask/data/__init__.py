"""Data sets, each a problem with train, validation and test."""
