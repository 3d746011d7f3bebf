"""The command line (`boosts ...`) and the embedded demo stack."""
