"""From the connection to the routes: limits, keys, errors, events, the chat page.

A connection holds requests one after another; each has a context, which its response's headers come from.
"""
