"""The command `bdlora`: convert, inspect and verify adapters."""
