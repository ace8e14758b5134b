"""The core on several releases of Megatron-Core; `python -m tests.compat` makes the table."""
