"""Many processes as one: how they meet, tell each other that they live, and work in step."""
