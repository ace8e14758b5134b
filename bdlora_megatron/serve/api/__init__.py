"""The API server: OpenAI's API over HTTP, in a process without torch."""
