"""What the machine we run on does for us: files that are there whole or not at all, JSON from disk, the terminal."""
