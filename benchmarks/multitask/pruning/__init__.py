"""Methods under test: cuts, channel cuts, procedures."""
