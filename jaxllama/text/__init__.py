"""Text to token ids and back: tokenizers, chat templates, stops, reasoning, tools, structured output."""
