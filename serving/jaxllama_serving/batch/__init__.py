"""Files of requests: read, answered and written so that a killed run resumes."""
