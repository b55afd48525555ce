"""The steps of a request in order: prepare, prompt, choices, run, response."""
