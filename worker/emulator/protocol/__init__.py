"""What requests may say: the wire models of vLLM 0.32's HTTP API, their bounds, and the words of their errors.

The names, the order of the fields and the order of the checks are vLLM's: they show in error messages.
"""
