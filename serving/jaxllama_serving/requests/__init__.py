"""A request from its body to its last byte: request → prepare → prompt → run → choices → response.

`prepare` reads the body into a request of `protocol`, with its sampling parameters; the prompt of a chat is rendered
(`chat_prompt`) and encoded. `run` leads through all of it, in one piece or as a stream. `choices` are the rows that the
engine runs for the request, and their text as it grows. A response is the JSON that is made of them.
"""
