"""Collections of adapters that share bases, as `bdlora compress` writes them."""
