"""What every room may lean on and nobody outside sees: ranks that agree, whole files, an undisturbed model, tables.

A file here knows neither tasks nor scores, and no pruning method.
"""
