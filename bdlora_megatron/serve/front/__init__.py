"""The front: OpenAI's API over HTTP, in a process without torch."""
