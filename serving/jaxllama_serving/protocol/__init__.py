"""What each route's body may hold: strict models, of which validation, error messages and OpenAPI are made.

A field is honoured (a field of a model), harmless (`shared_fields.HarmlessFields`), refused by name (`refused`) or
unknown (`base`). What the routes answer is in `responses`. No jax, no aiohttp.
"""
