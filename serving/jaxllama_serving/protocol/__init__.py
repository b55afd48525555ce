"""What each route's body may hold: strict models, of which validation, error messages and OpenAPI are made.

No jax, no aiohttp.
"""
