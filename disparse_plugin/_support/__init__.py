"""What every room may lean on and nobody outside sees: ranks that agree, whole files, an undisturbed model, tables.

A file here knows no scores, no masks' meaning and no method.
"""
