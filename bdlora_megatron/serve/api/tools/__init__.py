"""Tool calling: what a request asks for, how a model writes calls down, and how they are read."""
