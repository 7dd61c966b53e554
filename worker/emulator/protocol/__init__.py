"""The wire models of vLLM 0.32's HTTP API, their bounds and their error messages.

Names, the order of fields and the order of checks are vLLM's, because error messages show them. This is also why the
completion and the chat request repeat fields: pydantic puts the fields of a common base first.
"""
