"""What every room may lean on and nobody outside sees: ranks that agree, whole files, an undisturbed model."""
