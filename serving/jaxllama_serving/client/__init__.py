"""Clients of any server with OpenAI's API: a load generator, and a chat for the terminal."""
