"""From the connection to the routes: limits, keys, errors, events, the chat page."""
