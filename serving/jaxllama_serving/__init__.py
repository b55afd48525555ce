"""The HTTP server: OpenAI's chat API over one jaxllama model, and a chat page."""
